"""The loader equals a naive concatenation, and refuses what is not as it was written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.tokens.loader import Batches, Split, TokenDataset
from headrace.tokens.order import row_at


def stream(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split, read without the loader."""
    shards = json.loads((folder / "dataset.json").read_text())["splits"][split]["shards"]
    return np.concatenate([np.fromfile(folder / f"{shard['name']}.bin", "<i4") for shard in shards])


def test_rows_equal_a_naive_concatenation(dataset: Path) -> None:
    split, tokens = TokenDataset(dataset).split("train"), stream(dataset, "train")
    assert split.tokens == len(tokens) and split.rows(4096) == len(tokens) // 4096
    for index in range(split.rows(4096)):
        expected = tokens[index * 4096 : index * 4096 + 4096]
        assert np.array_equal(split.row(index, 4096, sequence_length=4096), expected)
    row = split.row(0, 10, sequence_length=7)
    assert row.dtype == np.int32 and row.tolist() == tokens[:10].tolist()


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum),
    st.integers(0, 60),
    st.integers(0, 70),
)
def test_the_stream_is_a_ring_over_any_shards(sizes: list[int], start: int, length: int) -> None:
    whole = np.arange(sum(sizes), dtype=np.int32)
    shards = np.split(whole, np.cumsum(sizes)[:-1])
    expected = [(start + i) % len(whole) for i in range(length)]
    assert Split("train", shards).read(start, length).tolist() == expected


def test_a_batch_is_a_pure_function_of_seed_and_position(dataset: Path) -> None:
    split, tokens = TokenDataset(dataset).split("train"), stream(dataset, "train")
    batches = Batches(split, 11, 128, 2)
    assert batches.rows == len(tokens) // 128
    first = batches.rows - 3  # over the end of an epoch
    batch = batches.batch(first, 8)
    assert batch.shape == (8, 130) and batch.dtype == torch.int64
    for place in range(8):
        start = row_at(11, first + place, batches.rows) * 128
        assert batch[place].tolist() == np.take(tokens, range(start, start + 130), mode="wrap").tolist()
    parts = torch.cat(
        [Batches(TokenDataset(dataset).split("train"), 11, 128, 2).batch(first + i, 2) for i in (0, 2, 4, 6)]
    )
    assert torch.equal(parts, batch)
    assert not torch.equal(Batches(split, 12, 128, 2).batch(first, 8), batch)
    assert batches.row_indices(first, 8) == [row_at(11, first + place, batches.rows) for place in range(8)]


def test_batches_do_not_depend_on_where_shards_end(dataset: Path) -> None:
    tokens = stream(dataset, "train")
    one, many = Split("train", [tokens]), Split("train", np.array_split(tokens, 37))
    assert torch.equal(Batches(one, 5, 100, 2).batch(0, 300), Batches(many, 5, 100, 2).batch(0, 300))


@pytest.mark.parametrize("name", ["train-00001-of-00003.bin", "validation-00000-of-00001.idx"])
def test_damaged_shards_are_refused_by_name(dataset: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-4])
    with pytest.raises(UserError, match=rf"{name}: {len(whole) - 4} bytes instead of {len(whole)}: truncated"):
        TokenDataset(folder)
    middle = len(whole) // 2
    (folder / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        TokenDataset(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        TokenDataset(folder)


def test_a_split_without_a_row_and_one_that_is_not_there(dataset: Path, tiny: Config) -> None:
    tokens = TokenDataset(dataset)
    assert tokens.eos == 1 and tokens.vocab_size == tiny.tokenizer.vocab_size
    with pytest.raises(UserError, match=r"split 'validation' has \d+ tokens, less than one row of 10000000"):
        Batches(tokens.split("validation"), 0, 10_000_000, 1)
    with pytest.raises(UserError, match="no split 'test'"):
        tokens.split("test")


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: no such file"):
        TokenDataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"splits": [1]}')
    with pytest.raises(UserError, match=r"dataset\.json: not a description"):
        TokenDataset(tmp_path)


def test_names_in_the_description_never_leave_the_folder(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    description = json.loads((folder / "dataset.json").read_text())
    shard = description["splits"]["train"]["shards"][0]
    shard["files"] = {f"../../{name}": kept for name, kept in shard["files"].items()}
    (folder / "dataset.json").write_text(json.dumps(description))
    TokenDataset(folder)  # the same files, found by their bare names inside the folder
