"""Rows that are read while others are trained on; what they hold is tested in test_training_v3.py."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.artifacts.files import write_json
from headrace.config.compose import load
from headrace.errors import UserError
from headrace.model import loss
from headrace.model.documents import document_starts
from headrace.tokens import loader
from headrace.tokens.plan import Unit
from headrace.tokens.shards import Encoded, finish, write_shard
from headrace.training.rows import ReadAhead, open_rows


class Source:
    """`batch`, and which calls came from which thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool]] = []
        self.damaged: int | None = None

    def batch(self, first: int, sequences: int) -> Tensor:
        self.calls.append((first, sequences, threading.current_thread() is threading.main_thread()))
        if self.damaged is not None and first <= self.damaged < first + sequences:
            raise UserError(f"row {self.damaged} is damaged")
        return torch.arange(first, first + sequences)


def test_steps_find_their_rows_read_whatever_the_stride() -> None:
    source = Source()
    ahead = ReadAhead(source.batch)
    for step in range(20):
        assert ahead(8 * step + 2, 4).tolist() == list(range(8 * step + 2, 8 * step + 6))  # rank 1 of 2 reads 4 of 8
    assert [first for first, _, here in source.calls if here] == [2, 10]  # the stride is known then


def test_jumps_and_other_sizes_change_nothing() -> None:
    ahead = ReadAhead(Source().batch)
    for first, sequences in [(0, 4), (4, 4), (8, 4), (4, 4), (12, 4), (12, 4), (16, 8), (100, 8), (0, 1), (1, 1)]:
        assert ahead(first, sequences).tolist() == list(range(first, first + sequences))


def test_a_row_that_cannot_be_read_is_said_when_it_is_asked_for_and_not_before() -> None:
    source = Source()
    source.damaged = 9
    ahead = ReadAhead(source.batch)
    assert ahead(0, 4).tolist() == [0, 1, 2, 3]
    assert ahead(4, 4).tolist() == [4, 5, 6, 7]
    with pytest.raises(UserError, match="row 9 is damaged"):
        ahead(8, 4)


def test_what_the_loader_marks_the_loss_ignores() -> None:
    assert loader.IGNORED == loss.IGNORED


SPLITS = ("train", "validation", "heldout")


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose tokens tell their source: 100 of `web`, 200 of `code`."""
    folder = tmp_path_factory.mktemp("two")
    units = [Unit("train", 0, 1, "web"), Unit("train", 0, 1, "code"), *(Unit(split, 0, 1) for split in SPLITS[1:])]
    inputs = {"tokenizer": "t", "eos": 1, "vocab_size": 999, "row_lengths": [16, 32]}
    for unit in units:
        tokens = np.full(64 * 16, 200 if unit.source == "code" else 100, dtype=np.int32)
        tokens[15::16] = 1
        documents = [Encoded(tokens, np.full(64, 16, dtype=np.int32), 64)]
        facts = write_shard(folder / unit.name, documents, [16, 32])
        write_json(folder / f"{unit.name}.json", {"inputs": inputs, "counts": {}, **facts})
    finish(folder, units)
    return folder


def test_documents_begin_where_the_loader_says(two_sources: Path) -> None:
    """The model finds them by itself, from the id that a run reads from its dataset if it is to mask documents."""
    words = ["experiment=tiny", "recipe.sequence_length=32", "recipe.extensions=[]"]
    assert open_rows(two_sources, load(words)).eos is None
    rows = open_rows(two_sources, load([*words, "train.mask_documents=true"]))
    assert rows.eos == 1
    batches = loader.Batches(loader.TokenDataset(two_sources).split("train"), 0, 32, 2)
    batch = batches.batch(0, 8)
    for starts, bounds in zip(document_starts(batch, rows.eos)[:, :32], batches.cu_seqlens(batch), strict=True):
        assert [*starts.unique().tolist(), 32] == bounds.tolist() == [0, 16, 32]


def test_a_run_draws_its_sources_by_the_weights_of_its_recipe(two_sources: Path) -> None:
    yarn = (
        "{type:yarn,factor:2.0,beta_fast:32.0,beta_slow:1.0,mscale:1.0,mscale_all_dim:1.0,"
        "original_max_position_embeddings:16}"
    )
    config = load(
        [
            "experiment=tiny", "corpus=files", "recipe.sequence_length=16", "recipe.batch_sequences=8",
            "recipe.tokens=6400", "recipe.batch_ramp=null",
            "corpus.sources=[{name:web,paths:[w],text_field:text},{name:code,paths:[c],text_field:text}]",
            "recipe.mixture=[{since:0,weights:{web:3,code:1}},{since:50%,weights:{web:0,code:1}}]",
            f"recipe.extensions=[{{name:longer,steps:5,sequence_length:32,batch_sequences:2,learning_rate:1e-4,"
            f"rope_scaling:{yarn}}}]",
        ]
    )  # fmt: skip
    rows = open_rows(two_sources, config)
    first = [rows.batch(position, 8)[:, 0].tolist() for position in range(0, 400, 8)]
    drawn = [token for batch in first for token in batch]
    assert [drawn[begin : begin + 4].count(200) for begin in range(0, 200, 4)] == [1] * 50
    assert set(drawn[200:]) == {200}
    assert set(open_rows(two_sources, config, "longer").batch(0, 10)[:, 0].tolist()) == {200}
    assert rows.training_rows == 128
