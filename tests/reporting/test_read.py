"""Artifacts written as their rooms document them, read back as facts."""

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import write_json
from headrace.config.compose import load
from headrace.errors import UserError
from headrace.evaluation.precision import study_facts
from headrace.parallel.mesh import Mesh
from headrace.pipeline.communication import with_communication
from headrace.pipeline.generators import generate
from headrace.pipeline.measured import timeline
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.timeline import COMMUNICATION, Span
from headrace.reporting.facts import Baseline, Difference, Estimate
from headrace.reporting.read import (
    _LOSS_ROWS,
    differences,
    read_evaluation,
    read_stage,
    read_study,
    read_training,
)
from headrace.reporting.recipe import DATA, write_recipe
from headrace.training.history import shares
from headrace.training.trainer import RECENT_ROWS

CONFIG = load(["experiment=tiny"])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def pretrain(tmp_path: Path) -> Path:
    keys = (
        "tokens",
        "steps",
        "seconds",
        "tokens_per_second",
        "mfu",
        "gemm_peak_flops",
        "loss",
        "validation_loss",
        "skipped_steps",
        "validation_rows",
    )
    facts = {key: float(i) for i, key in enumerate(keys, 1)}
    write_json(tmp_path / "training.json", {**facts, "device": "cpu", "dispatch": "deepep 1.2.1"})
    write_rows(
        tmp_path / "metrics.jsonl",
        [
            {
                "step": 1,
                "tokens": 100,
                "loss": 7.0,
                "mtp_loss": 7.1,
                "gradient_norm": 3.0,
                "maxvio": 2.0,
                "sequences": 2,
            },
            {"step": 2, "tokens": 200, "validation_loss": 6.5},
            {"step": 3, "tokens": 300, "loss": 6.0, "validation_loss": 6.1, "tokens_per_second": 50.0, "sequences": 4},
        ],
    )
    write_recipe(CONFIG.recipe, tmp_path)
    write_json(tmp_path / "formats.json", [{"what": "router", "format": "FP32"}])
    last = CONFIG.model.num_hidden_layers
    load_ = [[3, 1], [2, 2]]
    layers = {str(last): [shares(load_)[0]], "1": [shares(load_)[1]]}
    write_json(
        tmp_path / "expert_load.json",
        {"steps": [1], "tokens": [100], "layers": layers, "maxvio": {}, "maxvio_mean": [0.25]},
    )
    return tmp_path


def test_training(pretrain: Path) -> None:
    facts = read_training(pretrain, CONFIG.model)
    assert (facts.tokens, facts.loss_train, facts.loss_validation, facts.gemm_peak_flops) == (1.0, 7.0, 8.0, 6.0)
    assert facts.curves["train"] == ((100.0, 7.0), (300.0, 6.0))
    assert facts.curves["validation"] == ((200.0, 6.5), (300.0, 6.1))
    assert facts.curves["mfu"] == ()
    assert (facts.loss_train_steps, facts.loss_train_tokens) == (2, 6 * CONFIG.recipe.sequence_length)
    assert (facts.validation_rows, facts.validation_length) == (10.0, CONFIG.recipe.extensions[-1].sequence_length)
    assert facts.formats == (("router", "FP32"),)
    assert facts.expert_load is not None
    last = CONFIG.model.num_hidden_layers
    assert facts.expert_load.layers == {"layer 1": ((0.5, 0.5),), f"layer {last} (MTP)": ((0.75, 0.25),)}
    assert facts.expert_load.max_violation == ((100.0, 0.25),)


def test_the_training_loss_is_of_the_steps_that_the_trainer_averages(pretrain: Path) -> None:
    """In a run whose rows are twice as long from step 100 on."""
    assert _LOSS_ROWS == RECENT_ROWS
    write_rows(
        pretrain / "metrics.jsonl", [{"step": s, "tokens": s, "loss": 5.0, "sequences": 2} for s in range(1, 106)]
    )
    planned = json.loads((pretrain / DATA).read_text())
    main = planned["phases"][0]
    longer = {**main, "first": 99, "end": 105, "sequence_length": 2 * main["sequence_length"]}
    write_json(pretrain / DATA, {**planned, "phases": [{**main, "first": 0, "end": 99}, longer]})
    found = read_training(pretrain, CONFIG.model)
    # steps 96 to 99 are short, 100 to 105 are long
    assert (found.loss_train_steps, found.loss_train_tokens) == (10, 2 * (4 + 6 * 2) * main["sequence_length"])
    assert found.validation_length == longer["sequence_length"]


def test_the_timeline_of_a_step(pretrain: Path) -> None:
    assert read_training(pretrain, CONFIG.model).pipeline_step is None
    schedule = with_communication(generate("dualpipe", 2, 4))
    spans = [*simulate(schedule, Costs()).spans, Span(1, 2.0, 2.5, "dispatch", COMMUNICATION)]
    for pipeline in (1, 2):
        written = timeline(schedule, "as configured", [2, 1], Mesh(pipeline, 2, 2, 1, 0), spans)
        write_json(pretrain / "timeline.json", {"step": 3, **written})
        step = read_training(pretrain, CONFIG.model).pipeline_step
        assert (step is None) == (pipeline == 1)  # ranks without a pipeline have no timeline
    assert step is not None
    assert (step.step, step.schedule, step.reason, step.device) == (3, "dualpipe", "as configured", "cpu")
    assert step.dispatch == "deepep 1.2.1"
    assert (step.pipeline, step.data, step.expert, step.microbatches, step.layers) == (2, 2, 2, 4, (2, 1))
    assert (*step.measured.spans, *step.measured.collectives) == tuple(spans)
    assert step.planned.spans == step.measured.spans
    assert step.planned.idle == (0.0, 0.0)  # DualPipe on two ranks
    assert step.live_activations == (3, 3)


def test_a_model_without_experts_has_no_load(pretrain: Path) -> None:
    write_json(
        pretrain / "expert_load.json", {"steps": [], "tokens": [], "layers": {}, "maxvio": {}, "maxvio_mean": []}
    )
    assert read_training(pretrain, CONFIG.model).expert_load is None


def test_a_broken_line_is_named(pretrain: Path) -> None:
    with (pretrain / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 4 is not JSON"):
        read_training(pretrain, CONFIG.model)


def test_evaluation(tmp_path: Path) -> None:
    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "units": 9}

    def kind(size: int) -> dict[str, Any]:
        models = {
            "model": estimate(2.0),
            "bigram": estimate(2.4),
            "unigram": estimate(3.6),
            "xz -9": {"value": 1.9, "low": None, "high": None, "units": 1},
        }
        return {
            "documents": 3,
            "tokens": 7,
            "bytes": size,
            "models": models,
            "paired": {"bigram": estimate(-0.4), "unigram": estimate(-1.6)},
            "nats_per_token": {},
        }

    task = {
        "metric": "accuracy",
        "higher_is_better": True,
        "score": estimate(0.3),
        "chance": 0.25,
        "measures": "m",
        "items": 5,
        "shots": 0,
    }
    compared = {
        "compared": "a / b",
        "tokens": 8,
        "mean": 0.0,
        "shift": estimate(-0.01),
        "largest": 0.1,
        "identical": False,
        "line": None,
        "tied_rows": 0,
        "passed": True,
    }
    write_json(
        tmp_path / "results.json",
        {
            "bits_per_byte": {"kinds": {"aaa": kind(1), "all": kind(9), "docs": kind(8)}},
            "tasks": {"puzzles": task},
            "agreement": {"comparisons": [compared], "passed": True},
            "skipped": {"humaneval": "no sandbox"},
            "absent": ["CMath: not in the harness"],
        },
    )
    write_rows(
        tmp_path / "samples.jsonl",
        [{"prompt": "a\u2028b", "continuation": "c", "settings": "greedy", "document": "d.py"}],
    )
    facts = read_evaluation(tmp_path)
    assert [score.kind for score in facts.bits_per_byte] == ["all", "docs", "aaa"]
    assert list(facts.bits_per_byte[0].baselines) == ["unigram", "bigram", "xz -9"]
    assert facts.bits_per_byte[0].baselines["xz -9"] == Baseline(1.9)
    bigram = facts.bits_per_byte[0].baselines["bigram"]
    assert (bigram.low, bigram.high) == (2.3, 2.5)
    assert facts.agreement[0].shift == Estimate(-0.01, -0.11, pytest.approx(0.09))
    assert facts.bits_per_byte[0].baselines["bigram"].difference == Estimate(-0.4, -0.5, pytest.approx(-0.3))
    assert (facts.tasks[0].name, facts.tasks[0].chance, facts.agreement[0].limit) == ("puzzles", 0.25, None)
    assert facts.samples[0].prompt == "a\u2028b"
    assert facts.skipped == {"humaneval": "no sandbox"} and facts.absent == ("CMath: not in the harness",)


def test_study(tmp_path: Path) -> None:
    def run(role: str, pair: int, losses: list[float | None], stopped: int | None = None) -> dict[str, Any]:
        facts = {"skipped_steps": 0, "seconds": 2.5, "tokens_per_second": 800.0, "device": "cpu", "threads": 2}
        name = f"pair-{pair}-{role}" if pair >= 0 else f"ablation-{role}"
        return {
            **facts, "name": name, "role": role, "pair": max(pair, 0), "losses": losses, "validation_loss": losses[-1],
            "diverged_at": stopped, "format": "BF16" if role == "baseline" else "FP8",
            "seed": {"init": pair, "data": 9}, "machine": {"processor": "abacus", "host": "mill"},
        }  # fmt: skip

    runs = [run("baseline", 0, [8.0, 2.0]), run("candidate", 0, [8.0, 2.1]), run("baseline", 1, [8.0, 4.0]),
            run("candidate", 1, [8.0, 4.0]), run("per_tensor", -1, [8.0], 2)]  # fmt: skip
    facts = study_facts(runs, 0.0, (1000, 2000))
    write_json(tmp_path / "study.json", {**facts, "formats": [["layers", "BF16", "E4M3"]]})
    study = read_study(tmp_path, "there")
    assert study.differences[0].measure == "training loss, second half"
    assert study.differences[0].each == pytest.approx((0.05, 0.0))
    assert study.differences[0].mean is not None and study.differences[0].mean.value == pytest.approx(0.025)
    assert study.each[0] == ((1000.0, 0.0), (2000.0, pytest.approx(0.05)))
    assert [x for x, _, _ in study.band] == [1000.0, 2000.0]
    assert study.ablations[0].points == ((1000.0, 0.0),)
    assert (study.ablations[0].name, study.ablations[0].diverged_at) == ("per_tensor", 2)
    assert study.runs[2].seeds == "init 1, data 9" and study.runs[2].where == "cpu, 2 threads, abacus (mill)"
    assert (study.formats, study.source, study.tokens) == ((("layers", "BF16", "E4M3"),), "there", 2000)


def test_stage(tmp_path: Path) -> None:
    folder = tmp_path / "convert" / "0123456789ab"
    (folder / "artifact").mkdir(parents=True)
    assert manifests.build(folder / "artifact", kind="convert", producer={}, inputs={"pretrain": "aa"}, summary={}).hash
    write_json(folder / "provenance.json", {"seconds": 1.5, "made": "1 shard"})
    stage = read_stage("convert", ("pretrain",), folder)
    assert (stage.fingerprint, stage.seconds, stage.made, stage.inputs) == (
        "0123456789ab",
        1.5,
        "1 shard",
        {"pretrain": "aa"},
    )
    assert stage.manifest_hash == manifests.read(folder / "artifact").hash
    working = read_stage("report", ("convert",), tmp_path / "report" / "ba9876543210")
    assert working.manifest_hash is None and working.seconds is None


def test_differences_are_dotted_and_lists_are_one_value() -> None:
    default = {"a": {"b": 1, "c": [1, 2], "gone": 0}, "d": None}
    here = {"a": {"b": 1, "c": [1]}, "d": {"e": 5}}
    assert differences(default, here) == (
        Difference("a.c", [1, 2], [1]),
        Difference("d.e", None, 5),
        Difference("a.gone", 0, None),
    )
