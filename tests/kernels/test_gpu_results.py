"""Figures from real GPUs are a committed file that says where they come from; nothing in CI measures them again.

`make bench-gpu` writes kernels/gpu_results.json on a machine with a GPU: correctness first, then speed. How it puts the
file together is tested on rows made up here.
"""

import datetime
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "kernels" / "gpu_results.json"
MAY_NOT_RUN = "movers (CUDA)"  # they need nvcc


@pytest.fixture(scope="module")
def results() -> dict:
    if not RESULTS.exists():
        pytest.skip(
            "no kernels/gpu_results.json: GPU results are not run in CI, `make bench-gpu` writes them where a GPU is"
        )
    return json.loads(RESULTS.read_text())


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_says_that_ci_did_not_run_it(results):
    assert "not run in CI" in results["note"]


def test_says_on_what_when_and_from_which_source_it_was_measured(results):
    assert results["card"].strip() and results["driver"]
    assert results["versions"].keys() >= {"torch", "triton", "cuda"}
    assert all(isinstance(version, str) and version for version in results["versions"].values())
    assert datetime.date.fromisoformat(results["date"][:10]) >= datetime.date(2026, 1, 1)
    assert re.fullmatch(r"[0-9a-f]{40}", results["commit"]), "the full hash of the commit that was measured"
    assert results["uncommitted_changes"] is False


def test_every_kernel_that_was_timed_was_correct_first(results):
    assert results["correctness"], "correctness comes before speed"
    wrong = {
        name: check
        for name, check in results["correctness"].items()
        if check["passed"] is not True and not (name == MAY_NOT_RUN and check["passed"] is None)
    }
    assert wrong == {}


def test_all_sections_are_there(results, gpu):
    check_sections(results, gpu)


def check_sections(results: dict, gpu) -> None:
    assert results["seconds"] < 480
    assert all(results[section] for section in gpu.SECTIONS)
    assert [aim["aim"] for aim in results["aims"]] == [1250, 1230, 800, 2.5, 1.5]
    for row in results["gemms"]:
        assert ("failed" in row) != (row.get("tflops", 0) > 0)


def made_up(gpu, wrong=(), silent=(), calls=None):
    """What the parts of a run would say, where the kernels `wrong` are wrong and the parts `silent` hang."""

    def gemm(product, shape, back_end, tflops):
        return {"product": product, "shape": shape, "back_end": back_end, "tflops": tflops, "share": tflops / 1979}

    rows = {
        "movers": [{"summary": "4 passed in 70 s", "status": 0}],
        "gemms": [
            gemm("dense", "M4096 N2112 K7168", "triton", 800.0),
            gemm("dense", "M4096 N2112 K7168", "gluon", 1000.0),
            gemm("dense", "M4096 N7168 K16384", "gluon", 1500.0),
            gemm("dense", "M4096 N7168 K2048", "gluon", 900.0),
            gemm("dense", "M4096 N2112 K7168", "scaled_mm", 1900.0),
            gemm("m_grouped", "E8 M4096 N7168 K4096, input gradient, up", "gluon", 1240.0),
            {"product": "k_grouped", "shape": "E8 S32768 N2048 K7168", "back_end": "gluon", "failed": "wrong"},
            {"absent": "torchao", "reason": "ModuleNotFoundError: no torchao"},
        ],
        "script quantisation": [
            {"copy_tb_s": 2.9, "rows": [
                {"kernel": "quantise_rows", "shape": "4096 x 7168", "tb_s": 2.6},
                {"kernel": "rmsnorm_quantise", "shape": "4096 x 7168", "tb_s": 2.7},
            ]}
        ],
        "script routing": [{"benchmark": "moe_routing", "route_us": 20.0}],
        "script dispatch": [{"benchmark": "dispatch", "combine_tb_s": 2.0}],
        "layers": [
            {"module": "transformer layer", "precision": "bf16", "ms": 30.0},
            {"module": "transformer layer", "precision": "fp8, triton", "ms": 24.0},
            {"module": "transformer layer", "precision": "fp8, gluon", "ms": 15.0},
        ],
    }  # fmt: skip

    def run(name, options, limit):
        if calls is not None:
            calls.append((name, options))
        if name in silent:
            return [], f"no end after {limit:.0f} s"
        if name.startswith("check "):
            names = gpu.gpu_checks.PARTS[name.removeprefix("check ")][1]
            return [{"name": one, "wrong": "off by 1" if one in wrong else ""} for one in names], ""
        return rows[name], ""

    return run


def test_results_are_put_together_and_compared_with_the_aims(gpu):
    results = json.loads(json.dumps(gpu.collect(made_up(gpu), quick=False, cuda=True)))
    check_sections(results, gpu)
    assert gpu.wrong_ones(results["correctness"]) == [] and results["correctness"][MAY_NOT_RUN]["passed"] is True
    assert results["absent"] == {"torchao": "ModuleNotFoundError: no torchao"} and results["copy_tb_s"] == 2.9
    found = {aim["what"].split()[0]: (aim["lowest"], aim["highest"], aim["met"]) for aim in results["aims"]}
    assert found == {
        "dense,": (1000.0, 1500.0, False),  # by shape the better of ours; others' and K = 2048 do not count
        "m-grouped": (1240.0, 1240.0, True),
        "k-grouped": (None, None, False),
        "quantisers": (2.6, 2.7, True),
        "FP8": (2.0, 2.0, True),
    }


def test_what_is_wrong_is_marked_and_not_timed(gpu):
    calls = []
    wrong = ("quantise_rows", "gluon dense", "route")
    results = gpu.collect(made_up(gpu, wrong, calls=calls), quick=False, cuda=True)
    assert gpu.wrong_ones(results["correctness"]) == ["quantise_rows", "route", "gluon dense"]
    options = dict(calls)
    assert set(options["gemms"][1].split(",")) == set(wrong)
    assert "script routing" not in options and results["routing"] == []
    quantised, normalised = results["quantisers"]
    assert "tb_s" not in quantised and quantised["wrong"] and normalised["tb_s"] == 2.7


def test_a_part_that_hangs_takes_nothing_else_along(gpu):
    results = gpu.collect(made_up(gpu, silent=("check gluon k_grouped", "layers")), quick=False, cuda=True)
    assert gpu.wrong_ones(results["correctness"]) == ["gluon k_grouped"]
    assert results["failures"].keys() == {"check gluon k_grouped", "layers"}
    assert results["gemms"] and results["layers"] == []


def test_a_process_that_does_not_end_is_stopped(gpu):
    rows, failure = gpu.in_process("check routing", [], 0.1)
    assert rows == [] and failure == "no end after 0 s"


@pytest.mark.parametrize(
    ("summary", "status", "passed"),
    [("4 passed in 70s", 0, True), ("1 failed, 3 passed", 1, False), ("4 skipped in 2s", 0, None), ("", 1, False)],
)
def test_the_movers_are_right_wrong_or_not_run(gpu, summary, status, passed):
    assert gpu.movers([{"summary": summary, "status": status}])["passed"] is passed


def test_a_wrong_product_and_unpromoted_sums_are_noticed(gpu):
    """Products that are off by a thousandth, and Hopper's accumulator without promotion, emulated exactly."""
    import torch

    import headrace_fp8_gemm.reference as reference
    from headrace.fp8.accumulator import matmul_hopper_exact

    class Emulated:
        __name__ = "emulated"

        def __init__(self, promotion):
            self.promotion = promotion

        def dense(self, a, a_scales, b, b_scales, out_dtype):
            left, right = a.float().split(128, 1), b.float().split(128, 1)
            scales = [a_scales[:, i, None] * b_scales.repeat_interleave(128, 0)[: len(b), i] for i in range(len(left))]
            if self.promotion:
                return sum(
                    scale * matmul_hopper_exact(*pair, True) for scale, *pair in zip(scales, left, right, strict=True)
                )
            scaled = a.float() * a_scales.repeat_interleave(128, 1), b.float() * b_scales.repeat_interleave(128, 1)[0]
            return matmul_hopper_exact(*scaled, False)

    class Off:
        __name__ = "off"

        def dense(self, *arguments):
            return reference.dense(*arguments) * 1.001

    torch.manual_seed(0)
    checks = gpu.gpu_checks
    assert checks.check_accumulation(Emulated(True)) == ""
    assert "norm-wise" in checks.check_accumulation(Emulated(False))
    assert checks.check_product(reference, "dense") == "" and "norm-wise" in checks.check_product(Off(), "dense")
