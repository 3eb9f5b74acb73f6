"""`make bench-gpu` without a GPU: its correctness part in the interpreter, and what it makes of failures."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.fp8.accumulator import accumulation_errors

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "kernels" / "gpu_results.json"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `make bench-gpu` itself is the test")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def run(*options):
    command = [sys.executable, "benchmarks/gpu.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_says_in_one_sentence_that_there_is_no_gpu():
    before = RESULTS.exists()
    done = run()
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and "no GPU" in done.stdout
    assert RESULTS.exists() == before


@pytest.mark.slow
@pytest.mark.alone
def test_kernels_are_right_in_the_interpreter():
    done = run("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = done.stdout.splitlines()
    assert all(line.endswith(" right") for line in verdicts)
    for name in ("quantise_rows ", "route ", "combine ", "triton accumulation ", "triton transformer layer "):
        assert any(line.startswith(name) for line in verdicts), name


def test_a_part_that_fails_or_is_silent_is_wrong(gpu):
    found = [{"name": "a", "wrong": ""}, {"name": "a", "wrong": "off"}, {"name": "b", "wrong": ""}]
    checks = gpu.verdicts(("a", "b", "c"), found, "")
    assert [check["passed"] for check in checks.values()] == [False, True, False]
    assert not any(check["passed"] for check in gpu.verdicts(("b",), found, "exit status 1").values())
    assert gpu.report(checks, [], []) == 1


def test_bounds_tell_promoted_sums_from_others(gpu):
    errors = accumulation_errors(gpu.gpu_checks.ACCUMULATION_DEPTH, size=16)
    norms = {(error.data, error.promotion): error.norm for error in errors if error.model == "exact"}
    for data, bound in (("positive", gpu.gpu_checks.ACCUMULATION_ERROR), ("zero mean", gpu.gpu_checks.PRODUCT_ERROR)):
        assert 2 * norms[data, True] < bound < norms[data, False] / 2
