"""convert: weights to the Hub's folder layout, checked against what they were made from tensor by tensor.

As a stage of the DAG it converts the run's own checkpoint. `source=<folder or Hub id>` instead converts any folder of
this family, without a training run and outside the DAG:

    python -m headrace.stages.convert source=deepseek-ai/DeepSeek-V3-Base convert.dtype=bf16

Finished shards outlive an attempt that was killed: they lie in the run directory until the artifact is whole.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import hash_file, link_or_copy, read_json, write_json
from headrace.checkpoint.reader import Checkpoint, at_step
from headrace.checkpoint.slices import TABLE
from headrace.config.compose import group_to_dict, load
from headrace.config.schema import Config, ModelConfig
from headrace.conversion.check import verify_export
from headrace.conversion.convert_folder import plan_conversion, write_conversion
from headrace.conversion.export import export
from headrace.conversion.hub_folder import HubFolder
from headrace.conversion.shards import Exported, Plan, Record, finished
from headrace.errors import UserError
from headrace.launch.deadline import Deadline, StopRequested
from headrace.recipe.model import final_model, model_in_phase
from headrace.recipe.schedule import Schedule
from headrace.stages import provenance
from headrace.stages.places import Place
from headrace.stages.pretrain import checkpoints
from headrace.stages.run import Door, Outcome, Run, failed, held, main, say
from headrace.stages.table import fingerprint, stage_named

KINDS = {"final": "model", "ema": "ema"}
"""The kind of a checkpoint's tensors that `convert.weights` names."""
_SHARDS, _RECORD = "shards", "shards.json"


def checkpoint(run: Run) -> Path:
    """The folder with the weights: the last ones, or those of the kept step `convert.step`. Read, they are verified."""
    kept = _kept(run)
    return kept.folder if kept else run.input("pretrain", quick=True) / "checkpoint"


def kind(run: Run) -> str:
    """Which of its tensors are converted."""
    return KINDS[run.config.convert.weights]


def network(run: Run) -> ModelConfig:
    """The network as it was at the converted step: phases of context extension change its rotary embedding."""
    config, step = run.config, run.config.convert.step
    if step is None:
        return final_model(config)
    return model_in_phase(config.model, Schedule(config.recipe).phase_at(step - 1))


def trained_state(run: Run) -> dict[str, Any]:
    """How far the converted weights were trained.

    `step`, `tokens` and `seconds`, and `position`, the rows of `recipe.sequence_length` that were read.
    """
    if kept := _kept(run):
        state = kept.state
        return {key: state[key] for key in ("step", "tokens", "position")} | {"seconds": state["counters"]["seconds"]}
    facts = read_json(run.input("pretrain", quick=True) / "training.json")
    return {"step": facts["steps"]} | {key: facts[key] for key in ("tokens", "position", "seconds")}


def body(run: Run) -> Outcome:
    """Export, then read everything back by another path and compare."""
    source, config, model = checkpoint(run), run.config.convert, network(run)
    tokenizer, shards = run.input("tokenizer"), run.folder / _SHARDS
    # The table holds the hash of every slice, so its own stands for all tensors.
    record = Record(run.folder / _RECORD, {"slices": hash_file(source / TABLE, "sha256"), "kind": kind(run)})
    made = export(
        source,
        model,
        tokenizer,
        shards,
        config.dtype,
        config.max_shard_bytes,
        config.unaligned,
        kind(run),
        record,
    )
    for path in sorted(shards.iterdir()):
        link_or_copy(path, run.output / path.name)
    try:
        verify_export(run.output, source, model, kind(run))
    except UserError:
        _forget(run.place)  # or the next attempt would take the same shards over
        raise
    return _outcome(made, config.dtype, ", the moving average of the weights" if config.weights == "ema" else "")


def finished_shards(run_folder: Path) -> int:
    """How far an interrupted conversion has got."""
    return finished(run_folder / _RECORD)


def _forget(place: Place) -> None:
    """Remove what an attempt would go on from, once the artifact is whole."""
    manifests.discard(place.folder / _SHARDS)
    (place.folder / _RECORD).unlink(missing_ok=True)


def _outcome(made: Exported, dtype: str, more: str) -> Outcome:
    summary = {"tensors": made.tensors, "shards": made.shards, "bytes": made.total_size, "dtype": dtype}
    line = f"{made.tensors:,} tensors, {made.total_size / 1e6:,.1f} MB in {dtype.upper()}{more}, verified"
    return Outcome(line, summary)


def _kept(run: Run) -> Checkpoint | None:
    """The checkpoint of the kept step, if one is named; its tensors are verified as they are read."""
    step = run.config.convert.step
    if step is None:
        return None
    return at_step(checkpoints(run.input("pretrain", quick=True).parent), step)


DOOR = Door("convert", body, algorithm="sha256", progress=finished_shards, after=_forget)


def program(words: Sequence[str]) -> int:
    """The command line: `source=` converts that, otherwise this is the stage; returns the exit code."""
    named = [word.removeprefix("source=") for word in words if word.startswith("source=")]
    if not named:
        return main(DOOR, words)
    try:
        return _from_source(named[-1], load([word for word in words if not word.startswith("source=")]))
    except (Exception, KeyboardInterrupt, StopRequested) as error:
        return failed("convert", error)


def _from_source(named: str, config: Config) -> int:
    """Convert what `source=` names into `results/convert/<fingerprint>/artifact`, known by source and settings."""
    if config.convert.step is not None or config.convert.weights != "final":
        raise UserError(f"source={named}: convert.step and convert.weights are for a run's weights; leave them out")
    # Here, since evaluate and publish read this module too and have no use for the Hub's client.
    from headrace.conversion.source import locate
    from headrace.publication.incoming import inspect_incoming

    source = locate(named)
    inspect_incoming(source.folder)
    settings = config.convert
    folder, plan = plan_conversion(source.folder, settings.dtype, settings.max_shard_bytes, settings.unaligned)
    values = {"convert": group_to_dict(config.convert), "sources": source.identity}
    version = stage_named("convert").version
    of = {"stage": "convert", "version": version, "config": values, "parents": {}}
    place = Place("convert", of, Path(config.paths.results) / "convert" / fingerprint(of))
    place.folder.mkdir(parents=True, exist_ok=True)
    write_json(place.folder / "stage.json", of)
    with Deadline(config.launch.minutes).watching(), held(place):
        if place.artifact.exists():
            manifests.verify(place.artifact)
            say(place, f"already finished: {place.artifact}")
        else:
            _convert(folder, plan, Record(place.folder / _RECORD, source.identity), place)
    return 0


def _convert(folder: HubFolder, plan: Plan, record: Record, place: Place) -> None:
    started, output = time.monotonic(), place.folder / "artifact.partial"
    provenance.write(place.folder, provenance.describe({}))
    write_conversion(folder, plan, output, record)
    try:
        verify_export(output, folder.path, folder.config)
    except UserError:
        record.path.unlink()
        raise
    outcome = _outcome(plan.exported, plan.dtype, "")
    manifests.build(
        output,
        kind="convert",
        producer={"stage": "convert", "version": place.slice["version"], "fingerprint": place.fingerprint},
        inputs={},
        summary=dict(outcome.summary),
        known=record.files,
    )
    manifests.commit(output, place.artifact)
    record.path.unlink()
    say(place, f"{outcome.line}: {place.artifact}", time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
