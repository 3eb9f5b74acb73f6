"""The loop on the real network at its smallest, and on rows from real token shards."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from headrace.checkpoint.reader import newest_valid
from headrace.config.compose import load
from headrace.config.recipe import ExtensionConfig, RopeScaling
from headrace.config.schema import Config
from headrace.config.shards import training_shards
from headrace.errors import UserError
from headrace.stages import pretrain
from headrace.stages.run import main
from headrace.stages.token_units import encoder_of
from headrace.tokens.loader import TokenDataset
from headrace.tokens.plan import Text, plan
from headrace.tokens.shards import Source, finish, make_shard
from headrace.tokens.tokenizer import build_tokenizer
from headrace.training.learner import build_engine
from headrace.training.on_rank import Job
from headrace.training.place import Place, Watchers
from headrace.training.rows import Rows, open_rows
from headrace.training.telling import moe_layers
from headrace.training.trainer import Trainer
from small_corpus import tokenized
from toy_run import Recorder

STEPS, LENGTH = 24, 32
SPLITS = ("corpus.validation_fraction=0.2", "corpus.heldout_fraction=0.2")


@pytest.fixture(scope="module")
def config() -> Config:
    """`experiment=tiny`'s pico model in BF16, 24 steps of 4 x 32 tokens in two microbatches."""
    base = load(["experiment=tiny", "tracking.log_every=1", "parallel.microbatch=2", "checkpoint.interval=8"])
    plain = replace(base.recipe, batch_ramp=None, extensions=(), ema_decay=None)
    recipe = replace(plain, tokens=STEPS * 4 * LENGTH, sequence_length=LENGTH, batch_sequences=4)
    return replace(base, recipe=recipe, tokens=replace(base.tokens, row_lengths=(LENGTH, 2 * LENGTH)))


def repetitive(first: int, sequences: int) -> Tensor:
    """Rows of one cycle of 20 tokens, each begun at another place."""
    return (torch.arange(first, first + sequences)[:, None] * 3 + torch.arange(LENGTH + 2)) % 20 + 6


def trained(config: Config, folder: Path, stop_after: int | None = None) -> Trainer:
    rows = Rows(repetitive, 1000, repetitive(7, 3), repetitive(9, 2)[:, : LENGTH + 1])
    recorder, device = Recorder(stop_after), torch.device("cpu")
    watchers = Watchers(recorder, logging.getLogger("headrace.test"), recorder, recorder)
    trainer = Trainer(config, build_engine(config, device), rows, Place(folder, "0" * 12, 1e6, None), watchers)
    trainer.run()
    return trainer


def tensors_at_end(folder: Path) -> dict[str, Tensor]:
    found = newest_valid(folder)
    assert found is not None
    assert found.step == STEPS
    return {name: found.get(kind, name) for kind in found.kinds for name in found.names(kind)}


def test_interrupted_twice_is_bitwise_equal_and_it_learns(config: Config, tmp_path: Path) -> None:
    trained(config, tmp_path / "straight")
    for stop_after in (5, 9):
        trained(config, tmp_path / "broken", stop_after)
    last = trained(config, tmp_path / "broken")
    straight, broken = tensors_at_end(tmp_path / "straight"), tensors_at_end(tmp_path / "broken")
    assert straight.keys() == broken.keys()
    assert all(torch.equal(straight[name], broken[name]) for name in straight)
    bias = straight["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0.005  # it moved by 0.001 a step

    (tmp_path / "artifact").mkdir()
    last.write_results(tmp_path / "artifact")
    rows = [json.loads(line) for line in (tmp_path / "artifact" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert 6.5 < rows[0]["loss"] < 7.5  # ln 1024 = 6.93 is guessing
    assert rows[-1]["loss"] < 3.5
    assert rows[-1]["mtp_loss"] < 4.5
    load_of_experts = json.loads((tmp_path / "artifact" / "expert_load.json").read_text())
    assert list(load_of_experts["layers"]) == moe_layers(config.model) == ["1", "2"]
    assert all(len(row) == 8 for layer in load_of_experts["layers"].values() for row in layer)


@pytest.fixture(scope="module")
def dataset(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of three small splits."""
    folder = tmp_path_factory.mktemp("data")
    corpus, tokenizer, tokens = (folder / name for name in ("corpus", "tokenizer", "tokens"))
    for path in (corpus, tokenizer, tokens):
        path.mkdir()
    texts = {
        split: [f"{split} document {n}: " + " ".join(str(n * k) for k in range(80)) for n in range(documents)]
        for split, documents in (("train", 60), ("validation", 30), ("heldout", 12))
    }
    for name, split in (("sample", "train"), ("validation", "validation")):
        rows = {"id": list(range(len(texts[split]))), "text": texts[split]}
        pq.write_table(pa.table(rows), corpus / f"{name}.parquet")
    build_tokenizer(config.tokenizer, corpus, tokenizer, print)
    sizes = {split: (len(inside), sum(map(len, inside))) for split, inside in texts.items()}
    training = Text(["texts"], *(np.array([count]) for count in sizes.pop("train")))
    units = plan(training, sizes, training_shards(config.tokens), 3.0)
    encoder = encoder_of(tokenizer, config.tokens)
    for unit in units:
        first = sum(other.documents for other in units[: unit.index]) if unit.split == "train" else 0
        mine = list(enumerate(texts[unit.split]))[first : first + unit.documents]
        make_shard(unit, Source(unit.name, lambda mine=mine: mine), encoder, config.tokens, tokens)
    finish(tokens, units)
    return tokens


def test_rows_come_from_their_splits_with_all_targets(config: Config, dataset: Path) -> None:
    rows = open_rows(dataset, config)
    assert rows.batch(3, 4).shape == (4, LENGTH + 2)
    assert rows.batch(3, 4).dtype == torch.int64
    assert torch.equal(rows.batch(3, 4)[1:], rows.batch(4, 3))
    assert rows.validation.shape == (config.train.validation_rows, LENGTH + 2)
    assert rows.agreement.shape == (8, LENGTH + 1)
    assert (rows.agreement >= 0).all()
    assert len(rows.validation.unique(dim=0)) == config.train.validation_rows
    other = open_rows(dataset, replace(config, seed=replace(config.seed, data=1)))
    assert torch.equal(other.validation, rows.validation)
    assert not torch.equal(other.batch(0, 8), rows.batch(0, 8))


def test_rows_of_another_length_have_an_order_of_their_own(config: Config, dataset: Path) -> None:
    scaling = RopeScaling("yarn", 2.0, 32.0, 1.0, 1.0, 1.0, LENGTH)
    extension = ExtensionConfig("long", 3, 2 * LENGTH, 2, 1e-3, scaling)
    config = replace(config, recipe=replace(config.recipe, extensions=(extension,)))
    short, long = open_rows(dataset, config), open_rows(dataset, config, "long")
    assert long.batch(0, 2).shape == (2, 2 * LENGTH + 2)
    assert long.validation.shape == (config.train.validation_rows // 2, 2 * LENGTH + 2)
    assert torch.equal(long.agreement, short.agreement)
    assert long.training_rows == short.training_rows
    split = TokenDataset(dataset).split("train")
    rows = split.rows(2 * LENGTH)
    every = sorted(split.row(index, 2 * LENGTH).tolist() for index in range(rows))
    assert sorted(long.batch(0, rows)[:, : 2 * LENGTH].tolist()) == every  # each of an epoch once
    # In the order of the short rows, row i of the long ones would begin as row 2 i of those does.
    assert not any(torch.equal(long.batch(i, 1)[0, :LENGTH], short.batch(i, 1)[0, :LENGTH]) for i in range(8))


def test_a_length_that_shards_are_not_packed_for_is_said(config: Config, dataset: Path) -> None:
    recipe = replace(config.recipe, sequence_length=100_000)
    with pytest.raises(UserError, match=r"'train'.*add 100000 to tokens\.row_lengths"):
        open_rows(dataset, replace(config, recipe=recipe))


def test_the_recipe_can_be_looked_at_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("experiment=tiny", "tracking=disabled", "corpus=files", "tokenizer.vocab_size=300", *SPLITS)
    words, seen = tokenized(tmp_path, settings), list[str]()

    def not_a_step(job: Job, folder: Path, watchers: Watchers) -> None:
        seen.extend([(folder / "recipe.svg").read_text(), *map(str, folder.glob("checkpoints/*"))])
        raise UserError("it was to be looked at only")

    monkeypatch.setattr(pretrain, "train_supervised", not_a_step)
    assert main(pretrain.DOOR, words) == 2
    (picture,) = seen
    assert "learning rate" in picture
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
