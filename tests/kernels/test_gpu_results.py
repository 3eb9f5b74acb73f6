"""Figures from real GPUs are a committed file that says where they come from; nothing in CI measures them again.

`make bench-gpu` writes kernels/gpu_results.json on a machine with a GPU: correctness first, then speed.
"""

import datetime
import json
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "kernels" / "gpu_results.json"


@pytest.fixture(scope="module")
def results() -> dict:
    if not RESULTS.exists():
        pytest.skip(
            "no kernels/gpu_results.json: GPU results are not run in CI, `make bench-gpu` writes them where a GPU is"
        )
    return json.loads(RESULTS.read_text())


def test_says_that_ci_did_not_run_it(results):
    assert "not run in CI" in results["note"]


def test_says_on_what_when_and_from_which_source_it_was_measured(results):
    assert results["card"].strip()
    assert results["versions"].keys() >= {"torch", "triton", "cuda"}
    assert all(isinstance(version, str) and version for version in results["versions"].values())
    assert datetime.date.fromisoformat(results["date"][:10]) >= datetime.date(2026, 1, 1)
    assert re.fullmatch(r"[0-9a-f]{40}", results["commit"]), "the full hash of the commit that was measured"


def test_every_kernel_that_was_timed_was_correct_first(results):
    assert results["correctness"], "correctness comes before speed"
    wrong = {name: check for name, check in results["correctness"].items() if check["passed"] is not True}
    assert wrong == {}
