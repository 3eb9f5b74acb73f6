"""`make bench-convert` in its quick form: every way is measured, and its figures fit together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.alone
def test_every_way_is_measured(tmp_path):
    command = [sys.executable, "benchmarks/conversion.py", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == "conversion" and found["quick"] and found["met"].keys() == found["aims"].keys()
    sizes, ways = found["bytes"], found["ways"]
    assert 1.9 < sizes["fp32"] / sizes["bf16"] < 2.1 and 1.7 < sizes["bf16"] / sizes["fp8"] < 2.0
    sources = {"copy of BF16": "bf16", "BF16 -> FP8": "bf16", "FP8 -> BF16": "fp8", "FP32 checkpoint -> BF16": "fp32"}
    for way, source in sources.items():
        row, of_copy = ways[way], ways[f"copy of {source.upper()}"]
        assert row["rate"] == pytest.approx(sizes[source] / row["seconds"], rel=0.01)
        assert row["ratio"] == pytest.approx(of_copy["seconds"] / row["seconds"], rel=0.05, abs=0.01)
    assert {way for way in ways if way in done.stdout} == ways.keys() and "transformers" in ways
    assert all(row["peak"] >= 0.9 * ways["nothing"]["peak"] for way, row in ways.items() if way != "nothing")
    assert list(tmp_path.iterdir()) == []
