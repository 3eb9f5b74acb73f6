import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation_world import LENGTH, World
from headrace.artifacts.files import read_json
from headrace.artifacts.tensors import load_tensors, save_tensors
from headrace.config.compose import load
from headrace.errors import UserError
from headrace.evaluation.agreement import DisagreementError
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
