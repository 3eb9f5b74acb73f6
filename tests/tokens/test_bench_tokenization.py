"""`make bench-tokenize` in its quick mode: every way that is installed runs, and what they store is compared."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tokenization")


def nothing() -> None:
    pass


def documents(made: tuple[np.ndarray, np.ndarray]) -> Counter[tuple[int, ...]]:
    tokens, starts = made
    return Counter(tuple(tokens[first:end].tolist()) for first, end in pairwise(starts))


@pytest.mark.slow
def test_quick_mode_reports_every_way(bench: ModuleType) -> None:
    command = [sys.executable, "benchmarks/tokenization.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["benchmark"], summary["quick"], summary["aims"]) == ("tokenize", True, bench.AIMS)
    peers = [way for way in bench.PACKAGES if way not in summary["missing"]]
    assert set(summary["ways"]) == {"ours", "ours, FIM", "read", "read and write", "HF", *peers}
    for row in summary["ways"].values():
        assert row["MB_per_s"] == pytest.approx(summary["bytes"] / row["wall_s"] / 1e6, rel=0.1)
    ours, theirs = summary["ways"]["ours"], summary["ways"]["HF"]
    assert summary["ratio"]["beside HF"] == pytest.approx(ours["MB_per_core_s"] / theirs["MB_per_core_s"], rel=0.01)
    assert summary["same_documents"] == dict.fromkeys(peers, 1.0)
    assert (summary["two_processes"] is None) is (len(os.sched_getaffinity(0)) == 1)
    assert f"{summary['documents']:,} documents" in done.stdout


@pytest.mark.slow
def test_all_ways_store_the_documents_of_the_reference(bench: ModuleType, tmp_path: Path) -> None:
    facts = bench.prepare(tmp_path, 0.2, quick=True)
    parquet, tokenizer = tmp_path / "text.parquet", tmp_path / "tokenizer"
    texts = pq.read_table(parquet)["text"].to_pylist()
    assert facts["documents"] == len(texts) and facts["bytes"] == sum(len(text.encode()) for text in texts) >= 200_000
    assert (
        len(set(texts)) == len(texts) and pq.ParquetFile(parquet).metadata.row_group(0).column(1).compression == "ZSTD"
    )
    reference = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    expected = Counter((*reference.encode(text, add_special_tokens=False).ids, 1) for text in texts)
    ways = ["ours", *(way for way, (_, module) in bench.PACKAGES.items() if bench.found(module))]
    for way in ways:
        (tmp_path / way).mkdir()
        assert documents(bench.WAYS[way](parquet, tokenizer, tmp_path / way, nothing)) == expected, way
    (tmp_path / "fim").mkdir()
    other = documents(bench.ours_fim(parquet, tokenizer, tmp_path / "fim", nothing))
    assert other.total() == expected.total() and other != expected


def test_a_document_that_differs_is_counted(bench: ModuleType) -> None:
    assert bench.shared([1, 2, 3, 4], [4, 3, 2, 1]) == 1.0
    assert bench.shared([1, 2, 3, 5], [4, 3, 2, 1]) == 0.75


def test_a_way_that_fails_ends_the_benchmark(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ours: ended before its turn with 1"):
        bench.run(["ours"], tmp_path, sorted(os.sched_getaffinity(0)))  # no file, no tokenizer
