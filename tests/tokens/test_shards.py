"""Shards: every document once, the same bytes for any workers and after any kill, and a gate for the engine."""

import json
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from headrace.config.schema import Config
from headrace.corpus.documents import selected_documents
from headrace.corpus.pieces import pieces
from headrace.errors import UserError
from headrace.tokens import encode as encode_module
from headrace.tokens import shards as shards_module
from headrace.tokens.encode import CHECKED_AT_LEAST
from headrace.tokens.engine import Engine, open_engine
from headrace.tokens.indexed import IndexedReader, read_pack
from headrace.tokens.shards import finish
from headrace.tokens.tokenizer import CONTROL, FIM_BEGIN, FIM_END, FIM_HOLE
from tokens.conftest import Work

SUFFIXES = (".bin", ".idx", ".L128.pack", ".L256.pack")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("split", ["train", "validation", "heldout"])
def test_every_document_is_there_once_and_ends_with_eos(dataset: Path, work: Work, split: str) -> None:
    reference = Tokenizer.from_file(str(work.tokenizer / "tokenizer.json"))
    texts = [
        text for _, _, text in selected_documents(work.corpus, work.lock, work.config.corpus, pieces(work.lock), split)
    ]
    found: Counter[str] = Counter()
    description = json.loads((dataset / "dataset.json").read_text())
    for unit, shard in zip(
        [unit for unit in work.units if unit.split == split], description["splits"][split]["shards"], strict=True
    ):
        reader = IndexedReader(dataset / shard["name"])
        mine = [reader.document(index) for index in range(len(reader))]
        assert all(tokens[-1] == 1 and not np.isin(tokens[:-1], [0, 1, 2]).any() for tokens in mine)
        decoded = [whole(reference, tokens[:-1]) for tokens in mine]
        first = sum(other.documents for other in work.units[: unit.index]) if split == "train" else 0
        assert Counter(decoded) == Counter(texts[first : first + unit.documents])
        assert decoded != texts[first : first + unit.documents]  # they are shuffled
        found.update(decoded)
        assert shard["tokens"] == len(reader.tokens) and shard["documents"] == len(reader)
        assert shard["bytes"] == sum(len(text.encode()) for text in decoded)
        by_power = Counter(int(length).bit_length() - 1 for length in reader.lengths)
        record = json.loads((dataset / f"{shard['name']}.json").read_text())
        assert record["lengths"] == [by_power[power] for power in range(max(by_power) + 1)]
    assert found == Counter(texts)
    assert description["splits"][split]["documents"] == sum(description["splits"][split]["lengths"]) == len(texts)


def whole(reference: Tokenizer, tokens: np.ndarray) -> str:
    """The text of a document, also of one that is stored as prefix, suffix, middle."""
    if tokens[0] != CONTROL.index(FIM_BEGIN):
        return str(reference.decode(tokens.tolist(), skip_special_tokens=False))
    hole, end = (int(np.flatnonzero(tokens == CONTROL.index(token))[0]) for token in (FIM_HOLE, FIM_END))
    parts = tokens[1:hole], tokens[end + 1 :], tokens[hole + 1 : end]
    return "".join(reference.decode(part.tolist(), skip_special_tokens=False) for part in parts)


def test_a_tenth_of_training_documents_has_its_middle_filled_in_and_no_other(dataset: Path) -> None:
    splits = json.loads((dataset / "dataset.json").read_text())["splits"]
    train = splits["train"]
    assert abs(train["counts"]["fim"] / train["documents"] - 0.1) < 4 * (0.09 / train["documents"]) ** 0.5
    assert splits["validation"]["counts"]["fim"] == splits["heldout"]["counts"]["fim"] == 0


def test_rows_of_every_length_are_packed_and_counted(dataset: Path, tiny: Config) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["row_lengths"] == list(tiny.tokens.row_lengths) == [128, 256]
    for split in description["splits"].values():
        for length in tiny.tokens.row_lengths:
            starts = [
                read_pack(dataset / f"{shard['name']}.L{length}.pack", length, shard["tokens"])
                for shard in split["shards"]
            ]
            counts = [len(each) - 1 for each in starts]
            assert counts == [shard["rows"][str(length)] for shard in split["shards"]]
            assert split["rows"][str(length)] == sum(counts)
            assert split["tokens"] <= length * sum(counts)


def test_the_description_names_what_ids_depend_on(dataset: Path) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    assert (description["eos"], description["vocab_size"], description["engine"]) == (1, 1024, "fastokens")
    assert (
        description["tokenizer"].startswith("sha256:") and description["version"] and description["unicode"] == "16.0"
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(work: Work, dataset: Path, tmp_path: Path, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda unit: work.make(unit, tmp_path), work.units[::-1]))
    finish(tmp_path, work.units)
    assert contents(tmp_path) == contents(dataset)


def test_both_engines_give_the_same_tokens(work: Work, dataset: Path, tmp_path: Path) -> None:
    unit = work.units[0]
    record = work.make(unit, tmp_path, engine="tokenizers")
    assert record["inputs"]["engine"] == "tokenizers"
    for suffix in SUFFIXES:
        assert (tmp_path / f"{unit.name}{suffix}").read_bytes() == (dataset / f"{unit.name}{suffix}").read_bytes()


def test_a_rerun_touches_nothing_and_makes_only_what_is_missing_or_damaged(
    work: Work, dataset: Path, tmp_path: Path
) -> None:
    def run(**changes: int) -> dict[str, int]:
        for unit in work.units:
            work.make(unit, tmp_path, **changes)
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    first = run()
    assert run() == first
    damaged = tmp_path / "train-00001-of-00003.bin"
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "heldout-00000-of-00001.idx").unlink()
    again = run()
    changed = {name for name in first if first[name] != again[name]}
    stems = {"train-00001-of-00003", "heldout-00000-of-00001"}
    assert changed == {f"{stem}{suffix}" for stem in stems for suffix in (*SUFFIXES, ".json")}
    finish(tmp_path, work.units)
    assert contents(tmp_path) == contents(dataset)
    assert len(set(run(parity_every=7).values()) & set(again.values())) == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from headrace.config.compose import load
from headrace.corpus.lock import build_lock
from headrace.stages.token_units import Documents, encoder_of, units_of
from headrace.tokens import indexed, shards

stage, corpus, tokenizer, out = sys.argv[1], *map(Path, sys.argv[2:])
die = lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL)
if stage == "tokens":
    add = indexed.IndexedWriter.add
    indexed.IndexedWriter.add = lambda self, *arguments: (add(self, *arguments), self._bin.flush(), die())
elif stage == "index":
    indexed._write_index = die
elif stage == "publish":
    indexed.sync_folder = die
else:
    shards.write_json = die
config = load(["experiment=tiny"])
lock = build_lock(config.corpus)
unit = units_of(corpus, tokenizer, lock, config)[1]
documents = Documents(corpus, lock, config).of(unit)
shards.make_shard(unit, documents, encoder_of(tokenizer, config.tokens), config.tokens, out)
"""


def killed(work: Work, out: Path, stage: str) -> None:
    command = [sys.executable, "-c", KILLED, stage, str(work.corpus), str(work.tokenizer), str(out)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL


def test_what_a_killed_unit_was_writing_goes_when_it_runs_again_and_no_sooner(work: Work, tmp_path: Path) -> None:
    unit = work.units[1]
    for _ in range(2):
        killed(work, tmp_path, "tokens")
        assert len(list(tmp_path.glob(".*.tmp"))) == 1  # the first one's is gone
    work.make(work.units[0], tmp_path)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1  # of another unit, which may be at work
    work.make(unit, tmp_path)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {work.units[0].name, unit.name}


def test_a_quick_look_at_a_finished_shard_reads_nothing_of_it(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = work.units[0]
    made = work.make(unit, tmp_path)
    monkeypatch.setattr(shards_module, "describe", None)
    assert work.make(unit, tmp_path, quick=True) == made
    (tmp_path / f"{unit.name}.idx").write_bytes(b"short")
    with pytest.raises(TypeError, match="not callable"):  # so it is made again
        work.make(unit, tmp_path, quick=True)


@pytest.mark.parametrize("stage", ["tokens", "index", "publish", "record"])
def test_a_killed_unit_is_never_taken_for_done(work: Work, dataset: Path, tmp_path: Path, stage: str) -> None:
    killed(work, tmp_path, stage)
    assert not (tmp_path / "train-00001-of-00003.json").exists()
    with pytest.raises(UserError, match=r"train-0000[01]-of-00003\.json: no such file"):
        finish(tmp_path, work.units)
    for unit in work.units:
        work.make(unit, tmp_path)
    finish(tmp_path, work.units)
    assert contents(tmp_path) == contents(dataset)  # and nothing is left of the killed one


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_reads_back_otherwise_is_named_and_has_no_record(
    work: Work, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    unit = work.units[0]
    path, describe = tmp_path / f"{unit.name}{suffix}", shards_module.describe

    def damaged(read: Path) -> dict[str, Any]:
        if read == path:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return describe(read)

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "describe", damaged)
        with pytest.raises(OSError, match=rf"{path.name}: reads back otherwise than it was written"):
            work.make(unit, tmp_path)
    assert not (tmp_path / f"{unit.name}.json").exists()
    work.make(unit, tmp_path)
    assert path.read_bytes() == (dataset / path.name).read_bytes()


def test_an_engine_with_one_wrong_id_fails_the_shard_by_name(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = work.units[0]
    every = unit.documents // CHECKED_AT_LEAST
    assert 1 <= every < work.config.tokens.parity_every  # this shard is small

    def wrong(name: str, path: Path) -> Engine:
        engine = open_engine(name, path)  # type: ignore[arg-type]

        def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, offsets = engine.encode(texts)
            ids[offsets[every] + 3] += 1
            return ids, offsets

        return engine if name == "tokenizers" else replace(engine, encode=encode)

    monkeypatch.setattr(encode_module, "open_engine", wrong)
    with pytest.raises(UserError, match=r"shard train-00000-of-00003: document \d+ has other ids than `tokenizers`"):
        work.make(unit, tmp_path, fim_rate=0.0)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_engine_are_not_mixed_in(work: Work, tmp_path: Path) -> None:
    for unit in work.units:
        work.make(unit, tmp_path, engine="tokenizers" if unit.split == "heldout" else "auto")
    with pytest.raises(UserError, match=r"heldout-00000-of-00001: made with \{'engine': 'tokenizers'"):
        finish(tmp_path, work.units)
    assert not (tmp_path / "dataset.json").exists()


def test_a_unit_without_documents_is_an_empty_shard(work: Work, tmp_path: Path) -> None:
    record = work.make(replace(work.units[0], documents=0), tmp_path)
    assert (record["documents"], record["tokens"]) == (0, 0)
