"""From artifacts to facts: with `data` and `reliability`, all that knows how other rooms write their files.

Each function reads the files of finished artifacts and returns one part of `ReportFacts`; a missing file or key is an
error here, never a gap on the page. What a run did not make at all is for the caller to leave out.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json
from headrace.config.schema import ModelConfig
from headrace.errors import UserError
from headrace.pipeline.timeline import COMMUNICATION, Span
from headrace.planning.parameters import count
from headrace.reporting.facts import (
    Agreement,
    Baseline,
    BitsPerByte,
    Difference,
    Estimate,
    Evaluation,
    ExpertLoad,
    PipelineStep,
    Plan,
    Point,
    PrecisionStudy,
    Sample,
    Stage,
    StepTimeline,
    StudyAblation,
    StudyDifference,
    StudyRun,
    Task,
    Training,
)
from headrace.reporting.recipe import DATA, read_plan

_CURVES = {
    "train": "loss",
    "validation": "validation_loss",
    "mtp": "mtp_loss",
    "gradient_norm": "gradient_norm",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
}
_MEASURES = {
    "second_half": "training loss, second half",
    "end": "training loss, last step",
    "validation": "validation loss, end",
}
_REMARKABLE = {
    "skipped_steps": "steps not applied",
    "spikes": "loss spikes",
    "rollbacks": "rollbacks",
    "corruptions": "silent corruptions found",
    "saves_failed": "saves that failed",
}
_LOSS_ROWS = 10
"""Logged steps that the training loss of training.json is the mean of (`training.trainer.RECENT_ROWS`)."""
_MODEL, _BASELINES = "model", ("unigram", "bigram", "trigram", "xz -9")


def read_stage(name: str, parents: tuple[str, ...], folder: Path) -> Stage:
    """A run directory: manifest, seconds of its last attempt, and the line with which the stage ended.

    A stage that is still at work, as the report's own is, has neither manifest nor seconds.
    """
    artifact = folder / "artifact"
    if not artifact.exists():
        return Stage(name, folder.name, parents, None, "this page", None, {}, str(artifact))
    manifest = manifests.read(artifact)
    record = read_json(folder / "provenance.json")
    return Stage(
        name=name,
        fingerprint=folder.name,
        parents=parents,
        seconds=record["seconds"],
        made=record["made"],
        manifest_hash=manifest.hash,
        inputs=manifest.inputs,
        folder=str(artifact),
    )


def read_training(pretrain: Path, model: ModelConfig) -> Training:
    """The pretrain artifact; parameter counts are the planner's."""
    counted = count(model)
    facts = read_json(pretrain / "training.json")
    rows = _read_lines(pretrain / "metrics.jsonl")
    plan = read_plan(pretrain / DATA)
    averaged = [row for row in rows if "loss" in row][-_LOSS_ROWS:]
    return Training(
        parameters=counted.total,
        parameters_activated=counted.activated,
        parameters_mtp=counted.mtp,
        tokens=facts["tokens"],
        steps=facts["steps"],
        seconds=facts["seconds"],
        tokens_per_second=facts["tokens_per_second"],
        mfu=facts["mfu"],
        gemm_peak_flops=facts["gemm_peak_flops"],
        loss_train=facts["loss"],
        loss_train_steps=len(averaged),
        loss_train_tokens=sum(int(row["sequences"]) * _length_at(plan, int(row["step"])) for row in averaged),
        loss_validation=facts["validation_loss"],
        validation_rows=facts["validation_rows"],
        validation_length=plan.phases[-1].sequence_length,
        skipped_steps=facts["skipped_steps"],
        curves={name: _series(rows, metric) for name, metric in _CURVES.items()},
        plan=plan,
        expert_load=_read_load(pretrain / "expert_load.json", model.num_hidden_layers),
        formats=tuple((row["what"], row["format"]) for row in read_json(pretrain / "formats.json")),
        pipeline_step=_read_timeline(pretrain / "timeline.json", facts),
    )


def read_evaluation(evaluate: Path) -> Evaluation:
    """The evaluate artifact: results.json and samples.jsonl."""
    facts = read_json(evaluate / "results.json")
    kinds = facts["bits_per_byte"]["kinds"]
    return Evaluation(
        bits_per_byte=tuple(_bits(kind, kinds[kind]) for kind in _largest_first(kinds)),
        tasks=tuple(_task(name, entry) for name, entry in facts["tasks"].items()),
        agreement=tuple(_agreement(entry) for entry in facts["agreement"]["comparisons"]),
        samples=tuple(
            Sample(entry["prompt"], entry["continuation"], entry["settings"], entry["document"])
            for entry in _read_lines(evaluate / "samples.jsonl")
        ),
        skipped=facts["skipped"],
        absent=tuple(facts["absent"]),
    )


def read_study(folder: Path, source: str) -> PrecisionStudy:
    """The precision_study artifact; `source` is what the page calls its study.json."""
    facts = read_json(folder / "study.json")
    curves, difference = facts["curves"], facts["difference"]
    tokens = curves["tokens"]
    return PrecisionStudy(
        **{key: facts[key] for key in ("baseline", "candidate", "pairs", "steps", "tokens", "smoothing", "line")},
        verdict=difference["verdict"],
        differences=tuple(_difference(name, difference[key]) for key, name in _MEASURES.items()),
        largest=difference["largest"],
        spread=facts["spread"]["second_half"],
        mean=_points(tokens, curves["mean"]),
        band=tuple(
            (float(x), low, high)
            for x, low, high in zip(tokens, curves["low"], curves["high"], strict=True)
            if low is not None and high is not None
        ),
        each=tuple(_points(tokens, values) for values in curves["each"]),
        ablations=tuple(
            StudyAblation(name, **entry, points=_points(tokens, curves["ablations"][name]))
            for name, entry in facts["ablations"].items()
        ),
        runs=tuple(_study_run(run) for run in facts["runs"]),
        formats=tuple((row[0], row[1], row[2]) for row in facts["formats"]),
        source=source,
    )


def differences(default: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Dotted keys whose values differ, in the order of `here`; lists count as one value."""
    before, after = _flat(default), _flat(here)
    keys = [*after, *(key for key in before if key not in after)]
    return tuple(Difference(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON Lines; a broken line is an error that names it."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); make the artifact again") from None
    return rows


def _series(rows: list[dict[str, Any]], metric: str) -> tuple[Point, ...]:
    return tuple((float(row["tokens"]), float(row[metric])) for row in rows if metric in row)


def _length_at(plan: Plan, step: int) -> int:
    """Tokens of a row of this step, counted from 1."""
    for phase in plan.phases:
        if step <= phase.steps:
            return phase.sequence_length
        step -= phase.steps
    return plan.phases[-1].sequence_length


def _read_load(path: Path, first_mtp: int) -> ExpertLoad | None:
    """None for a model without experts. Layers are named by index; those from `first_mtp` on are MTP modules."""
    facts = read_json(path)
    if not facts["layers"] or not facts["tokens"]:
        return None
    by_index = sorted((int(name), shares) for name, shares in facts["layers"].items())  # JSON sorts '10' before '9'
    layers = {
        f"layer {index}{' (MTP)' if index >= first_mtp else ''}": tuple(map(tuple, shares))
        for index, shares in by_index
    }
    tokens = tuple(map(float, facts["tokens"]))
    return ExpertLoad(tokens, layers, tuple(zip(tokens, facts["maxvio_mean"], strict=True)))


def _read_timeline(path: Path, training: Mapping[str, Any]) -> PipelineStep | None:
    """None where one process trained, or ranks that form no pipeline."""
    if not path.exists() or (facts := read_json(path))["pipeline"] == 1:
        return None
    same: dict[str, Any] = {
        key: facts[key] for key in ("step", "schedule", "reason", "pipeline", "data", "expert", "microbatches")
    }
    same |= {key: tuple(facts[key]) for key in ("layers", "live_activations", "receive_buffers")}
    planned, measured = _step_timeline(facts["planned"]), _step_timeline(facts["measured"])
    same["dispatch"] = training.get("dispatch", "all_to_all")  # all there was when none was recorded
    return PipelineStep(**same, device=training["device"], planned=planned, measured=measured)


def _step_timeline(entry: Mapping[str, Any]) -> StepTimeline:
    spans = tuple(Span(*row) for row in entry["spans"])
    collectives = (replace(Span(*row), lane=COMMUNICATION) for row in entry.get("collectives", ()))
    return StepTimeline(spans, tuple(entry["idle"]), tuple(collectives))


def _estimate(entry: Mapping[str, Any]) -> Estimate:
    return Estimate(entry["value"], entry["low"], entry["high"])


def _difference(name: str, entry: Mapping[str, Any]) -> StudyDifference:
    return StudyDifference(name, None if entry["value"] is None else _estimate(entry), tuple(entry["each"]))


def _study_run(run: Mapping[str, Any]) -> StudyRun:
    machine = run["machine"]
    return StudyRun(
        **{key: run[key] for key in ("name", "format", "validation_loss", "skipped_steps", "diverged_at", "seconds")},
        tokens_per_second=run["tokens_per_second"],
        seeds=f"init {run['seed']['init']}, data {run['seed']['data']}",
        where=f"{run['device']}, {run['threads']} threads, {machine['processor']} ({machine['host']})",
    )


def _points(tokens: list[int], values: list[float | None]) -> tuple[Point, ...]:
    return tuple((float(x), y) for x, y in zip(tokens, values, strict=True) if y is not None)


def _largest_first(kinds: Mapping[str, Any]) -> list[str]:
    """'all', then kinds by bytes of text."""
    return sorted(kinds, key=lambda kind: (kind != "all", -kinds[kind]["bytes"], kind))


def _bits(kind: str, entry: Mapping[str, Any]) -> BitsPerByte:
    """Baselines stand in one order in every report, so that a mark always means the same."""
    models, paired = entry["models"], entry["paired"]
    baselines = {
        name: Baseline(
            models[name]["value"],
            _estimate(paired[name]) if name in paired else None,
            models[name]["low"],
            models[name]["high"],
        )
        for name in sorted(models, key=_baseline_order)
        if name != _MODEL
    }
    return BitsPerByte(kind, entry["documents"], entry["bytes"], _estimate(models[_MODEL]), baselines)


def _baseline_order(name: str) -> tuple[int, str]:
    return (_BASELINES.index(name) if name in _BASELINES else len(_BASELINES), name)


def _task(name: str, entry: Mapping[str, Any]) -> Task:
    return Task(
        name=name,
        metric=entry["metric"],
        higher_is_better=entry["higher_is_better"],
        items=entry["items"],
        shots=entry["shots"],
        score=_estimate(entry["score"]),
        chance=entry["chance"],
        measures=entry["measures"],
    )


def _agreement(entry: Mapping[str, Any]) -> Agreement:
    return Agreement(
        compared=entry["compared"],
        tokens=entry["tokens"],
        mean=entry["mean"],
        shift=_estimate(entry["shift"]),
        largest=entry["largest"],
        identical=entry["identical"],
        limit=entry["line"],
        tied_rows=entry["tied_rows"],
        passed=entry["passed"],
    )
