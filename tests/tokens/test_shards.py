"""Shards: every document once, the same bytes for any workers and after any kill, and a gate for the engine."""

import json
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.tokens import shards as shards_module
from headrace.tokens.engine import Engine, open_engine
from headrace.tokens.indexed import IndexedReader
from headrace.tokens.shards import Unit, finish, make_shard, plan


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_plan_follows_from_the_configuration_alone(tiny: Config) -> None:
    assert [unit.name for unit in plan(tiny.tokens)] == [
        "train-00000-of-00003",
        "train-00001-of-00003",
        "train-00002-of-00003",
        "validation-00000-of-00001",
        "heldout-00000-of-00001",
    ]


@pytest.mark.parametrize("split", ["train", "validation", "heldout"])
def test_every_document_is_there_once_and_ends_with_eos(
    dataset: Path, stdlib_corpus: Path, tokenizer_folder: Path, split: str
) -> None:
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    texts = pq.read_table(stdlib_corpus / f"{split}.parquet")["text"].to_pylist()
    found: Counter[str] = Counter()
    description = json.loads((dataset / "dataset.json").read_text())
    for number, shard in enumerate(description["splits"][split]["shards"]):
        reader = IndexedReader(dataset / shard["name"])
        mine = [reader.document(index) for index in range(len(reader))]
        assert all(tokens[-1] == 1 and not (tokens[:-1] < 6).any() for tokens in mine)
        decoded = [reference.decode(tokens[:-1].tolist(), skip_special_tokens=False) for tokens in mine]
        count = len(description["splits"][split]["shards"])
        assert Counter(decoded) == Counter(texts[number::count])
        assert (decoded == texts[number::count]) is (split != "train")  # training documents are shuffled
        found.update(decoded)
        assert shard["tokens"] == len(reader.tokens) and shard["documents"] == len(reader)
        assert shard["bytes"] == sum(len(text.encode()) for text in decoded)
    assert found == Counter(texts)
    assert description["splits"][split]["documents"] == len(texts)


def test_the_description_names_what_ids_depend_on(dataset: Path) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    assert (description["eos"], description["vocab_size"], description["engine"]) == (1, 1024, "fastokens")
    assert (
        description["tokenizer"].startswith("sha256:") and description["version"] and description["unicode"] == "16.0"
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, dataset: Path, tmp_path: Path, workers: int
) -> None:
    units = plan(tiny.tokens)[::-1]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda unit: make_shard(unit, stdlib_corpus, tokenizer_folder, tiny.tokens, tmp_path), units))
    finish(tmp_path, plan(tiny.tokens))
    assert contents(tmp_path) == contents(dataset)


def test_both_engines_give_the_same_tokens(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    unit = plan(tiny.tokens)[0]
    record = make_shard(unit, stdlib_corpus, tokenizer_folder, replace(tiny.tokens, engine="tokenizers"), tmp_path)
    assert record["inputs"]["engine"] == "tokenizers"
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"{unit.name}{suffix}").read_bytes() == (dataset / f"{unit.name}{suffix}").read_bytes()


def test_a_rerun_touches_nothing_and_makes_only_what_is_missing_or_damaged(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    def run(config: Config = tiny) -> dict[str, int]:
        for unit in plan(config.tokens):
            make_shard(unit, stdlib_corpus, tokenizer_folder, config.tokens, tmp_path)
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
    assert changed == {f"{stem}{suffix}" for stem in stems for suffix in (".bin", ".idx", ".json")}
    finish(tmp_path, plan(tiny.tokens))
    assert contents(tmp_path) == contents(dataset)
    assert len(set(run(replace(tiny, tokens=replace(tiny.tokens, parity_every=7))).values()) & set(again.values())) == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from headrace.config.compose import load
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
config = load(["experiment=tiny"]).tokens
shards.make_shard(shards.plan(config)[1], corpus, tokenizer, config, out)
"""


@pytest.mark.parametrize("stage", ["tokens", "index", "publish", "record"])
def test_a_killed_unit_is_never_taken_for_done(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, dataset: Path, tmp_path: Path, stage: str
) -> None:
    command = [sys.executable, "-c", KILLED, stage, str(stdlib_corpus), str(tokenizer_folder), str(tmp_path)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "train-00001-of-00003.json").exists()
    with pytest.raises(UserError, match=r"train-0000[01]-of-00003\.json: no such file"):
        finish(tmp_path, plan(tiny.tokens))
    for unit in plan(tiny.tokens):
        make_shard(unit, stdlib_corpus, tokenizer_folder, tiny.tokens, tmp_path)
    finish(tmp_path, plan(tiny.tokens))
    assert contents(tmp_path) == contents(dataset)  # and nothing is left of the killed one


def test_an_engine_with_one_wrong_id_fails_the_shard_by_name(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(name: str, path: Path) -> Engine:
        engine = open_engine(name, path)  # type: ignore[arg-type]

        def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, offsets = engine.encode(texts)
            ids[offsets[20] + 3] += 1  # document 20 of the shard; every 20th is compared
            return ids, offsets

        return engine if name == "tokenizers" else replace(engine, encode=encode)

    monkeypatch.setattr(shards_module, "open_engine", wrong)
    with pytest.raises(UserError, match=r"shard train-00000-of-00003: document \d+ has other ids than `tokenizers`"):
        make_shard(Unit("train", 0, 3), stdlib_corpus, tokenizer_folder, tiny.tokens, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_engine_are_not_mixed_in(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for unit in plan(tiny.tokens):
        config = replace(tiny.tokens, engine="tokenizers") if unit.split == "heldout" else tiny.tokens
        make_shard(unit, stdlib_corpus, tokenizer_folder, config, tmp_path)
    with pytest.raises(UserError, match=r"heldout-00000-of-00001: made with \{'engine': 'tokenizers'"):
        finish(tmp_path, plan(tiny.tokens))
    assert not (tmp_path / "dataset.json").exists()


def test_more_shards_than_documents(tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    record = make_shard(Unit("train", 5000, 5001), stdlib_corpus, tokenizer_folder, tiny.tokens, tmp_path)
    assert (record["documents"], record["tokens"]) == (0, 0)
