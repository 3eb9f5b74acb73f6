"""The exported folder as transformers sees it: nothing missing, nothing unexpected, the same logits, lossless MTP."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import MtpModel
from transformers.quantizers import quantizer_finegrained_fp8

from conversion_models import (
    ALIGNED,
    EDGES,
    LIKE_V3,
    VARIANTS,
    checkpoint_of,
    checkpoint_tensors,
    our_network,
    reference_model,
    tiny_model,
    tokenizer_folder,
)
from headrace.config.compose import load
from headrace.conversion.export import export, exported_bytes
from headrace.conversion.import_hub import import_, open_for_import
from headrace.conversion.mtp import mtp_loading
from headrace.conversion.names import checkpoint_shapes
from headrace.errors import UserError


@pytest.fixture(name="tokenizer", scope="module")
def _tokenizer(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


def load_quietly(folder, layers):
    with mtp_loading(layers):
        return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_every_tensor_and_computes_the_same_logits(variant, tmp_path, tokenizer):
    config = tiny_model(**VARIANTS[variant])
    source = reference_model(config)
    checkpoint_of(source, config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp32", 200_000)
    loaded, info = load_quietly(tmp_path / "hub", config.num_hidden_layers)
    assert {key: found for key, found in info.items() if found} == {}
    tokens = torch.randint(0, config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, got = source(tokens).logits, loaded(tokens).logits
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_greedy_generation_is_the_same_with_and_without_mtp(dtype, tmp_path, tokenizer):
    config = tiny_model(rope_scaling=None)
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", dtype, 1 << 30)
    with mtp_loading(config.num_hidden_layers):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    different = set()
    for seed in range(6):
        prompt = torch.randint(3, 300, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
        options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        plain = model.generate(prompt, **options)
        assert torch.equal(model.generate(prompt, use_mtp=True, **options), plain)
        different.add(tuple(plain[0, prompt.shape[1] :].tolist()))
    assert len(different) == 6


def test_drafts_of_the_exported_module_are_accepted(tmp_path, tokenizer):
    """A network that predicts from the last token alone, and an MTP module that does the same from [embedding; 0]."""
    config = tiny_model()
    tensors = checkpoint_of(reference_model(config), config, tmp_path / "random.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "eh_proj.weight")):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1.0)
    tensors["model.layers.2.eh_proj.weight"][:, : config.hidden_size] = torch.eye(config.hidden_size)
    save_file(tensors, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp32", 1 << 30)
    with mtp_loading(config.num_hidden_layers):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    model.generation_config.eos_token_id = None
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    prompt = torch.tensor([[5, 77, 9]])
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain, alone = model.generate(prompt, **options), len(passes)
    drafted = model.generate(prompt, use_mtp=True, **options)
    assert torch.equal(plain, drafted)
    assert alone == 24
    assert len(passes) - alone <= 13


def test_without_the_shim_transformers_drops_the_mtp_module(tmp_path, tokenizer):
    config = tiny_model()
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp32", 1 << 30)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert any(name.startswith("model.layers.2.") for name in info["unexpected_keys"])


def test_mtp_drafts_come_from_our_module(tmp_path, tokenizer):
    config = tiny_model()
    tensors = checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp32", 1 << 30)
    with mtp_loading(config.num_hidden_layers):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    mtp = MtpModel.from_pretrained(model)
    assert torch.equal(mtp.layers[0].eh_proj.weight, tensors["model.layers.2.eh_proj.weight"])
    fused = mtp.layers[0].mtp_block.mlp.experts.gate_up_proj
    assert torch.equal(fused.chunk(2, dim=1)[1], tensors["model.layers.2.mlp.experts.up_proj.weight"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_network_exports_to_the_same_function(variant, tmp_path, tokenizer):
    """Logits, and the MTP module's loss as transformers' own MTP layer computes it."""
    config = tiny_model(**VARIANTS[variant])
    network = our_network(config)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == checkpoint_shapes(config)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp32", 1 << 30)
    loaded, info = load_quietly(tmp_path / "hub", config.num_hidden_layers)
    assert {key: found for key, found in info.items() if found} == {}
    row = torch.randint(0, config.vocab_size, (2, 42), generator=torch.Generator().manual_seed(3))
    tokens, following = row[:, :40], row[:, 1:41]
    with torch.no_grad():
        expected = loaded(tokens, output_hidden_states=True)
        assert expected.logits.std() > 0.1
        assert (network(tokens) - expected.logits).abs().max() <= 1e-5
        if config.num_nextn_predict_layers:
            mtp = MtpModel.from_pretrained(loaded)
            positions = torch.arange(40).expand(2, -1)
            ahead = mtp.forward_layer(0, expected.hidden_states[-1], positions, None, input_ids=following)
            loss = cross_entropy(loaded.lm_head(ahead).flatten(0, 1), row[:, 2:42].flatten())
            assert network.losses(row, 0.3, 0.0).mtp.item() == pytest.approx(loss.item(), abs=1e-5)


def test_shards_have_v3_names_stay_within_the_limit_and_agree_with_the_index(tmp_path, tokenizer):
    config = tiny_model()
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    limit = 60_000
    made = export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "bf16", limit)
    files = sorted((tmp_path / "hub").glob("*.safetensors"))
    assert len(files) == made.shards > 3
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{made.shards:06d}.safetensors" for number in range(1, made.shards + 1)
    ]
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        found |= {name: (file.name, tensor) for name, tensor in tensors.items()}
        with safe_open(str(file), framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == made.total_size == sum(tensor.nbytes for _, tensor in found.values())
    for name, (_, tensor) in found.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)


@pytest.mark.parametrize("unaligned", ["deepseek", "bf16"])
@pytest.mark.parametrize("changes", [LIKE_V3, EDGES])
def test_fp8_shards_hold_each_weight_with_its_scales(changes, unaligned, tmp_path, tokenizer):
    config = tiny_model(**changes)
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    limit = 150_000
    made = export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp8", limit, unaligned)
    kinds, total, count = {}, 0, 0
    for file in sorted((tmp_path / "hub").glob("*.safetensors")):
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) <= 2
        total, count = total + size, count + len(tensors)
        for name, tensor in tensors.items():
            kinds[name] = tensor.dtype
            if tensor.dtype == torch.float8_e4m3fn:
                assert tensors[f"{name}_scale_inv"].shape == tuple(-(-size // 128) for size in tensor.shape)
    assert (total, count) == (made.total_size, made.tensors)
    queries, keys = (f"model.layers.2.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa"))
    assert kinds["model.layers.2.self_attn.q_b_proj.weight"] == torch.float8_e4m3fn
    assert kinds[queries] == kinds[keys] == (torch.float8_e4m3fn if unaligned == "deepseek" else torch.bfloat16)
    for name in ("lm_head", "model.embed_tokens", "model.layers.2.eh_proj", "model.layers.1.mlp.gate", "model.norm"):
        assert kinds[f"{name}.weight"] == torch.bfloat16
    assert kinds["model.layers.2.mlp.gate.e_score_correction_bias"] == torch.float32


def test_a_model_without_a_whole_block_is_not_called_fp8(tmp_path, tokenizer):
    config = tiny_model()
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"convert.unaligned=bf16: no matrix"):
        export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp8", 1 << 30, "bf16")
    assert not (tmp_path / "hub").exists()


@pytest.fixture(name="without_accelerate")
def _without_accelerate(monkeypatch):
    """transformers asks for accelerate before it reads FP8, and on a CPU does not use it."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)


def fp8_folder_and_values(config, tmp_path, tokenizer, unaligned):
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp8", 1 << 30, unaligned)
    import_(open_for_import(tmp_path / "hub"), tmp_path / "back", {})
    network = our_network(config)
    network.load_state_dict(checkpoint_tensors(tmp_path / "back"))
    return tmp_path / "hub", network


def largest_differences(model, network):
    """Of weights and of logits between transformers' model and ours."""
    found, wanted = model.state_dict(), network.state_dict()
    weights = max((found[name].float() - wanted[name]).abs().max().item() for name in wanted.keys() & found.keys())
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = (model.float()(tokens).logits - network(tokens)).abs().max().item()
    return weights, logits


@pytest.mark.parametrize(
    ("changes", "unaligned"), [(ALIGNED, "deepseek"), (LIKE_V3, "bf16"), (EDGES, "bf16"), ({}, "deepseek")]
)
def test_transformers_dequantises_whole_blocks_to_our_values(
    changes, unaligned, tmp_path, tokenizer, without_accelerate
):
    """Where all FP8 matrices are multiples of 128, or a single block; experts and the MTP module included."""
    config = tiny_model(**changes)
    hub, network = fp8_folder_and_values(config, tmp_path, tokenizer, unaligned)
    with mtp_loading(config.num_hidden_layers):
        model, info = AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    weights, logits = largest_differences(model, network)
    assert weights == 0 and logits <= 2e-5
    ours = network.state_dict()
    fused = model.model.layers[1].mlp.experts.gate_up_proj.chunk(2, dim=1)
    for got, name in zip(fused, ("gate_proj", "up_proj"), strict=True):
        assert torch.equal(got, ours[f"model.layers.1.mlp.experts.{name}.weight"])
    prompt = torch.tensor([[5, 77, 9]])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, use_mtp=True, **options), model.generate(prompt, **options))


def test_transformers_misreads_cut_blocks_without_a_word(tmp_path, tokenizer, without_accelerate, caplog):
    """What docs/pipeline-stages.md warns of. It takes rows / (rows of scales) for the height of a block: of 160 rows
    80, not 128. If this fails, transformers was repaired: take the warning out of the docs and of the card."""
    config = tiny_model(**LIKE_V3)
    hub, network = fp8_folder_and_values(config, tmp_path, tokenizer, "deepseek")
    with mtp_loading(config.num_hidden_layers):
        model, info = AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    assert not [record for record in caplog.records if "GPU" not in record.getMessage()]
    weights, logits = largest_differences(model, network)
    assert weights > 1e-3 and logits > 1e-3


def test_transformers_refuses_blocks_that_its_rule_does_not_divide(tmp_path, tokenizer, without_accelerate):
    """656 rows with 6 rows of scales, as V3's own 576 rows with 5."""
    config = tiny_model(**{**LIKE_V3, "qk_rope_head_dim": 132})
    hub, _ = fp8_folder_and_values(config, tmp_path, tokenizer, "deepseek")
    with mtp_loading(config.num_hidden_layers), pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32)


def test_the_folder_holds_the_contract_and_nothing_else(tmp_path, tokenizer):
    config = tiny_model()
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "fp32", 1 << 30)
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model-00001-of-000001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert loaded.decode(loaded("naïve ☃\n")["input_ids"]) == "naïve ☃\n"
    generation = GenerationConfig.from_pretrained(tmp_path / "hub")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)


def damage_missing(tensors):
    del tensors["model.layers.1.mlp.experts.up_proj.weight"]
    return "model.layers.1.mlp.experts.up_proj.weight is missing"


def damage_mtp(tensors):
    del tensors["model.layers.2.eh_proj.weight"]
    return "model.layers.2.eh_proj.weight is missing"


def damage_unknown(tensors):
    tensors["model.layers.9.eh_proj.weight"] = torch.zeros(2)
    return "model.layers.9.eh_proj.weight is unknown"


def damage_shape(tensors):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T.contiguous()[:, :-1].contiguous()
    return f"{name} has shape"


def damage_dtype(tensors):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].bfloat16()
    return f"{name} is BF16"


def damage_infinity(tensors):
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 2] = float("inf")
    return "model.layers.0.self_attn.o_proj.weight is not finite"


def damage_nan(tensors):
    tensors["model.layers.1.mlp.experts.down_proj.weight"][3, 2, 1] = float("nan")
    return r"model.layers.1.mlp.experts.3.down_proj.weight is not finite"


DAMAGES = [damage_missing, damage_mtp, damage_unknown, damage_shape, damage_dtype, damage_infinity, damage_nan]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_checkpoint_is_refused_by_name(damage, dtype, tmp_path, tokenizer):
    config = tiny_model()
    tensors = checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    message = damage(tensors)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        export(tmp_path / "damaged.safetensors", config, tokenizer, tmp_path / "hub", dtype, 1 << 30)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "hub").glob("*.safetensors"))


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path, tokenizer):
    config = tiny_model()
    checkpoint_of(reference_model(config), config, tmp_path / "model.safetensors")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(tmp_path / "model.safetensors", config, tokenizer, tmp_path / "hub", "bf16", 1 << 30)


def test_bytes_of_the_published_model_are_known_beforehand() -> None:
    """The published weight files hold 688,574,839,360 bytes of tensors (45,808 of them in FP8 with their scales)."""
    config = load(["model=v3_671b", "tokenizer.vocab_size=129280"]).model
    assert exported_bytes(config, "fp8", "deepseek") == 688_574_839_360
    assert exported_bytes(config, "fp32", "deepseek") > 1.9 * exported_bytes(config, "bf16", "deepseek")
