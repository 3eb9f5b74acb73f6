"""A tiny world for all tests of evaluation: tokenizer, random model, its export, held-out documents, training rows."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace.artifacts.files import write_json
from headrace.artifacts.tensors import save_tensors
from headrace.config.compose import load
from headrace.config.schema import ModelConfig
from headrace.conversion.export import export
from headrace.evaluation.scorer import TransformerScorer
from headrace.evaluation.text import TextEncoder
from headrace.model.initialisation import initialise
from headrace.model.transformer import Transformer

LENGTH = 48
CONTROLS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
]


@dataclass(frozen=True)
class World:
    """Paths and settings of the tiny world."""

    config: ModelConfig
    hub: Path
    checkpoint: Path
    agreement: Path
    heldout: Path
    tokenizer: Path
    texts: list[str]
    rows: NDArray[np.int64]

    def encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.config.vocab_size)


def sentences(seed: int, count: int) -> str:
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "def",
        "return",
        "import",
        "self",
        "value",
        "naïve",
        "数",
        "1",
        "22",
        "333",
    ]
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(words) + 1)
    chosen = generator.choice(words, size=count, p=weights / weights.sum())
    return " ".join(chosen.tolist()) + "\n"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    texts = [sentences(seed, 20 + 13 * (seed % 9)) for seed in range(40)]
    texts[3] += CONTROLS[1] + " is text here, 日本語 and é too"
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    train_tokenizer(tokenizer, texts)
    config = replace(load(["experiment=tiny"]).model, vocab_size=400)
    encoder = TextEncoder(tokenizer, config.vocab_size)
    stream = np.concatenate([np.append(ids, encoder.eos) for ids in encoder.encode(texts)])
    starts = range(0, len(stream) - LENGTH - 1, LENGTH)
    rows = np.stack([stream[start : start + LENGTH + 1] for start in starts])
    kinds = ["code" if number % 3 else "docs" for number in range(len(texts))]
    table = {"id": list(range(40)), "source": ["s"] * 40, "path": [f"p/{n}" for n in range(40)], "kind": kinds}
    parquet.write_table(arrow.table({**table, "text": texts}), root / "heldout.parquet", compression="zstd")

    model = Transformer(config, "bf16")
    initialise(model, config, 0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() >= 2:
                tensor.mul_(4)  # sharper than a fresh model, so that differences show
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.linspace(-0.02, 0.03, len(tensor)))
    save_tensors(root / "model.safetensors", model.state_dict())
    export(root / "model.safetensors", config, tokenizer, root / "hub", "bf16", 1 << 30)
    tokens = torch.from_numpy(rows[:6])
    scores = torch.cat([TransformerScorer(model).log_probabilities(row[None]) for row in tokens])
    save_tensors(root / "agreement.safetensors", {"tokens": tokens, "log_probabilities": scores})
    return World(
        config=config,
        hub=root / "hub",
        checkpoint=root / "model.safetensors",
        agreement=root / "agreement.safetensors",
        heldout=root / "heldout.parquet",
        tokenizer=tokenizer,
        texts=texts,
        rows=rows,
    )


def train_tokenizer(folder: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    names = {"bos_token": CONTROLS[0], "eos_token": CONTROLS[1], "pad_token": CONTROLS[2]}
    write_json(folder / "tokenizer_config.json", {**settings, **names})
