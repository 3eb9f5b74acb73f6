"""Small models for the conversion tests, built by transformers: weights, configuration and logits are its own."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from headrace.checkpoint.reader import checkpoint_folder, tensors_of
from headrace.config.compose import load
from headrace.config.recipe import RopeScaling
from headrace.config.schema import ModelConfig
from headrace.model.transformer import Transformer
from headrace.parallel.shards import Piece, pieces_of
from saved import save

YARN = RopeScaling("yarn", 8.0, 32.0, 1.0, 1.0, 1.0, 32)
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "dense_only_first": {"num_hidden_layers": 3, "first_k_dense_replace": 2},
    "no_dense_layer": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "direct_queries": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 256},
    "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5, "num_experts_per_tok": 3},
    "no_mtp": {"num_nextn_predict_layers": 0, "v_head_dim": 24},
    "eleven_layers": {"num_hidden_layers": 11, "hidden_size": 32},
}

# Matrices in blocks of 128 x 128: all of them multiples; all but kv_a_proj, as in V3; blocks cut at both edges.
ALIGNED: dict[str, object] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 128,
    "v_head_dim": 32,
}
LIKE_V3: dict[str, object] = {**ALIGNED, "qk_rope_head_dim": 32}
EDGES: dict[str, object] = {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "q_lora_rank": 128,
    "kv_lora_rank": 132,
    "qk_nope_head_dim": 24,
}


def tiny_model(**changes: object) -> ModelConfig:
    """experiment=tiny with a vocabulary of 300 and `changes`."""
    return replace(_tiny(), **{"vocab_size": 300, **changes})


@cache
def _tiny() -> ModelConfig:
    return load(["experiment=tiny"]).model


def transformers_config(config: ModelConfig) -> DeepseekV3Config:
    """transformers' configuration, written out by hand: it must not come through our config.json."""
    fields = asdict(config)
    scaling = fields.pop("rope_scaling")
    theta = fields.pop("rope_theta")
    rope = (
        {"rope_type": "yarn", **{k: v for k, v in scaling.items() if k != "type"}}
        if scaling
        else {"rope_type": "default"}
    )
    return DeepseekV3Config(
        **{**fields, "initializer_range": 0.02},
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={**rope, "rope_theta": theta},
        pad_token_id=2,
    )


def reference_model(config: ModelConfig, seed: int = 0) -> DeepseekV3ForCausalLM:
    """A random transformers model whose router biases change which experts are chosen."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(transformers_config(config)).eval()
    with torch.no_grad():
        _randomise(model)
    return model


def our_network(config: ModelConfig, seed: int = 0) -> Transformer:
    """The model room's network with weights that tell experts and layers apart."""
    network = Transformer(config, "fp32")
    torch.manual_seed(seed)
    with torch.no_grad():
        _randomise(network)
    return network


def mtp_module(model: DeepseekV3ForCausalLM, seed: int = 1) -> MtpModel:
    """transformers' own MTP module, random, sharing embedding and head with `model`."""
    torch.manual_seed(seed)
    mtp = MtpModel(model, 1).eval()
    with torch.no_grad():
        _randomise(mtp.layers)
    return mtp


def checkpoint_of(model: DeepseekV3ForCausalLM, config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Write the training checkpoint that holds `model` (and a random MTP module); returns its tensors."""
    tensors = _unfuse(model.state_dict())
    if config.num_nextn_predict_layers:
        prefix = f"model.layers.{config.num_hidden_layers}."
        for name, tensor in _unfuse(mtp_module(model).layers[0].state_dict()).items():
            tensors[prefix + name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return tensors


def sliced(folder: Path, **kinds: Mapping[str, Tensor]) -> Path:
    """A checkpoint with the tensors of each kind as three ranks write it, cut where no tensor has a boundary."""
    pieces = [{kind: [_third(p, rank) for p in pieces_of(t.items())] for kind, t in kinds.items()} for rank in range(3)]
    return save(folder, 7, *pieces)


def checkpoint_tensors(checkpoints: Path) -> dict[str, Tensor]:
    """The weights of the one checkpoint that an import has written."""
    with tensors_of(checkpoint_folder(checkpoints, 0)) as source:
        return {name: source.get(name) for name in source.keys()}  # noqa: SIM118  no mapping


def part_of(checkpoint: Path, folder: Path, *kinds: str) -> Path:
    """The table of a checkpoint and the files of some kinds, as the pretrain artifact holds them."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name == "slices.json" or path.name.partition("-")[0] in kinds:
            (folder / path.name).hardlink_to(path)
    return folder


def _third(piece: Piece, rank: int) -> Piece:
    flat = piece.tensor.reshape(-1)
    cuts = [0, len(flat) // 5, len(flat) * 3 // 4 - 1 if len(flat) > 9 else len(flat), len(flat)]
    begin, end = cuts[rank : rank + 2]
    return Piece(piece.name, flat[begin:end], piece.shape, begin)


def tokenizer_folder(path: Path, vocab: int = 290) -> Path:
    """A byte-level tokenizer with the three control tokens first, as `tokenizers` writes it."""
    path.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    words += [f"unused{number}" for number in range(vocab - len(words))]
    tokenizer = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def _randomise(module: torch.nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.2)
        elif "norm" in name:
            tensor.normal_(1.0, 0.1)
        elif name.endswith(("weight", "_proj")):
            tensor.normal_(std=0.1)


def _unfuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps gate and up projections of the experts in one tensor [E, 2*out, in]."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            (
                tensors[name.replace("gate_up_proj", "gate_proj.weight")],
                tensors[name.replace("gate_up_proj", "up_proj.weight")],
            ) = tensor.chunk(2, dim=1)
        elif name.endswith("experts.down_proj"):
            tensors[f"{name}.weight"] = tensor
        else:
            tensors[name] = tensor
    return tensors
