import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation_world import LENGTH, World
from headrace.artifacts.files import read_json
from headrace.artifacts.tensors import load_tensors, save_tensors
from headrace.config.compose import load
from headrace.conversion.export import export
from headrace.errors import UserError
from headrace.evaluation import hub_tasks
from headrace.evaluation.agreement import DisagreementError
from headrace.evaluation.comparison import EvaluatedRun, compare
from headrace.evaluation.evaluate import Inputs, evaluate


def inputs_of(world: World) -> Inputs:
    return Inputs(
        hub_folder=world.hub,
        checkpoint=world.checkpoint,
        agreement_file=world.agreement,
        heldout=world.heldout,
        tokenizer_folder=world.tokenizer,
        training_rows=lambda: world.rows.astype(np.int32),
        identity={"convert": "sha256:00", "corpus": "sha256:11"},
    )


def test_everything_is_measured_and_written_as_strict_json(world: World, tmp_path: Path) -> None:
    config = load(["experiment=tiny"]).evaluate
    lines: list[str] = []
    results = evaluate(inputs_of(world), config, world.config, LENGTH, "bf16", "bf16", tmp_path, lines.append)
    assert read_json(tmp_path / "results.json") == json.loads(json.dumps(results))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.jsonl", "results.json", "samples.jsonl"]
    kinds = results["bits_per_byte"]["kinds"]
    assert set(kinds) == {"all", "code", "docs"}
    assert set(kinds["all"]["models"]) == {"model", "unigram", "bigram", "trigram", "xz -9"}
    assert results["agreement"]["passed"] and set(results["tasks"]) == set(config.tasks)
    assert results["samples"] == config.samples and results["identity"]["convert"] == "sha256:00"
    assert [line.split(":")[0] for line in lines] == ["agreement", "held-out text", "baselines", "tasks", "samples"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == config.samples
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    documents = [entry for entry in items if entry["task"] == "bits_per_byte"]
    assert len(items) == 2 * config.items + len(documents) and len(documents) == kinds["all"]["documents"]
    bits = sum(entry["bits"]["model"] for entry in documents) / sum(entry["bytes"] for entry in documents)
    assert kinds["all"]["models"]["model"]["value"] == pytest.approx(bits)
    assert len({entry["hash"] for entry in documents}) == len(documents)
    assert results["skipped"] == {} and results["absent"] == []


def test_a_rerun_gives_the_same_figures(world: World, tmp_path: Path) -> None:
    config = replace(load(["experiment=tiny"]).evaluate, tasks=())
    first, second = (
        evaluate(inputs_of(world), config, world.config, LENGTH, "bf16", "bf16", tmp_path, lambda _: None) for _ in "ab"
    )
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and first["tasks"] == {}


def test_an_unknown_task_is_refused_before_anything_is_loaded(world: World, tmp_path: Path) -> None:
    config = replace(load(["experiment=tiny"]).evaluate, tasks=("humaneval",))
    missing = replace(inputs_of(world), hub_folder=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"unknown task 'humaneval'; known tasks: humaneval_likelihood, reasoning_gym"):
        evaluate(missing, config, world.config, LENGTH, "bf16", "bf16", tmp_path, lambda _: None)


def test_disagreement_stops_the_stage_and_leaves_no_results(world: World, tmp_path: Path) -> None:
    tensors = load_tensors(world.agreement)
    tensors["log_probabilities"] -= 0.01
    save_tensors(tmp_path / "agreement.safetensors", tensors)
    out = tmp_path / "out"
    out.mkdir()
    config = load(["experiment=tiny"]).evaluate
    wrong = replace(inputs_of(world), agreement_file=tmp_path / "agreement.safetensors")
    with pytest.raises(DisagreementError, match="reloaded"):
        evaluate(wrong, config, world.config, LENGTH, "bf16", "bf16", out, lambda _: None)
    assert not list(out.iterdir())


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def test_a_bf16_and_an_fp8_export_of_one_model_are_compared_item_by_item(world: World, tmp_path: Path) -> None:
    """Real results, end to end; what was said about each run alone is what the comparison says of it."""
    config = load(["experiment=tiny"]).evaluate
    export(world.checkpoint, world.config, world.tokenizer, tmp_path / "hub", "fp8", 1 << 30)
    runs = []
    for dtype, hub in (("bf16", world.hub), ("fp8", tmp_path / "hub")):
        out = tmp_path / dtype
        out.mkdir()
        inputs = replace(inputs_of(world), hub_folder=hub)
        results = evaluate(inputs, config, world.config, LENGTH, "bf16", dtype, out, lambda _: None)
        runs.append(EvaluatedRun(dtype, results, lines_of(out)))
    rows = {(row["task"], row["metric"]): row for row in compare(runs, config.bootstrap)["rows"]}
    assert set(rows) == {
        ("humaneval_likelihood", "bits per byte"),
        ("reasoning_gym", "accuracy"),
        ("reasoning_gym", "bits per byte"),
        *((f"bits_per_byte{kind}", "bits per byte") for kind in ("", ", code", ", docs")),
    }
    for run in runs:
        own = run.results["bits_per_byte"]["kinds"]
        for name, kind in (("bits_per_byte", "all"), ("bits_per_byte, code", "code"), ("bits_per_byte, docs", "docs")):
            assert rows[name, "bits per byte"]["values"][run.name] == own[kind]["models"]["model"]
        tasks = {name: task["score"] for name, task in run.results["tasks"].items()}
        assert rows["reasoning_gym", "accuracy"]["values"][run.name] == tasks["reasoning_gym"]
        assert rows["humaneval_likelihood", "bits per byte"]["values"][run.name] == tasks["humaneval_likelihood"]
    overall = rows["bits_per_byte", "bits per byte"]
    both = [overall["values"][name]["value"] for name in ("bf16", "fp8")]
    assert overall["differences"]["fp8"]["value"] == pytest.approx(both[1] - both[0]) and both[0] != both[1]


def test_the_same_text_cut_otherwise_is_not_the_same_item(world: World, tmp_path: Path) -> None:
    """Rows of another length give a token another context, so their bits are no pair."""
    config = replace(load(["experiment=tiny"]).evaluate, tasks=(), heldout_rows=10_000, samples=0)
    runs = []
    for length in (LENGTH, LENGTH // 2):
        results = evaluate(inputs_of(world), config, world.config, length, "bf16", "bf16", tmp_path, lambda _: None)
        runs.append(EvaluatedRun(str(length), results, lines_of(tmp_path)))
    sizes = [sum(entry["bytes"] for entry in run.entries) for run in runs]
    assert sizes[0] == sizes[1]
    with pytest.raises(UserError, match=r"nothing to compare: bits_per_byte.*: other items in"):
        compare(runs, 50)


def test_tasks_of_the_hub_without_a_network_stop_the_stage_before_it_begins_or_are_said_to_be_missing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_tasks, "reachable", lambda: False)
    config = replace(load(["experiment=tiny"]).evaluate, tasks=(), samples=0)
    harness = load(["evaluate=v3_base"]).evaluate.harness[5:7]
    wanted = replace(config, harness=harness, absent=("CMath: not in the harness",))
    missing = replace(inputs_of(world), hub_folder=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"evaluate\.harness: arc_easy: .* cannot be reached"):
        evaluate(missing, wanted, world.config, LENGTH, "bf16", "bf16", tmp_path, lambda _: None)
    told: list[str] = []
    skipping = replace(wanted, without_network="skip")
    results = evaluate(inputs_of(world), skipping, world.config, LENGTH, "bf16", "bf16", tmp_path, told.append)
    assert list(results["skipped"]) == ["arc_easy", "arc_challenge"] and results["tasks"] == {}
    assert results["absent"] == ["CMath: not in the harness"]
    assert any("arc_easy skipped (" in line and "absent: CMath: not in the harness" in line for line in told)
