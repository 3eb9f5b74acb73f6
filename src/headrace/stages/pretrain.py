"""pretrain: token shards to a trained model, with checkpoints on the way."""

import sys
from pathlib import Path
from typing import Any

from headrace.artifacts.files import link_or_copy, read_json, write_atomic, write_json
from headrace.checkpoint.reader import at_step, steps
from headrace.config.phases import phase_names
from headrace.errors import UserError
from headrace.fp8.numerics import describe
from headrace.launch.device import resolve
from headrace.pipeline.engine import schedule_of
from headrace.pipeline.measured import traces
from headrace.reporting.recipe import write_recipe
from headrace.reporting.reliability import RELIABILITY
from headrace.stages.imported import KIND as IMPORTS
from headrace.stages.imported import check_import
from headrace.stages.run import Door, Outcome, Run, main
from headrace.training import ledger
from headrace.training.ledger import figures, read
from headrace.training.on_rank import Job
from headrace.training.progress import progress_on
from headrace.training.supervisor import train_supervised
from headrace.training.trainer import Place, Watchers

FORMATS = "formats.json"  # the table "what runs in which format"
TIMELINE = "timeline.json"  # the planned and the measured timeline of one step
TRACE = "timeline.{}.trace.json"  # one of the two, "planned" or "measured", to be opened in Perfetto


def checkpoints(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def body(run: Run) -> Outcome:
    """Train from the newest good checkpoint to the end of the recipe, or save and stop where the deadline says so."""
    config = run.config
    device = resolve(config.launch.device)
    formats = describe(config.precision, device)
    for row in formats:
        run.log.info("%s: %s", row["what"].strip(), row["format"])
    for phase in phase_names(config.recipe):
        run.log.info("%s: pipeline schedule %s: %s", phase, *schedule_of(config, phase))
    for path in write_recipe(config.recipe, run.folder):  # to be looked at before training has begun
        link_or_copy(path, run.output / path.name)
    tokens = run.input("tokenize", quick=True)
    job = Job(config, tokens, run.output, _place(run))
    with run.deadline.polled():
        facts = train_supervised(job, run.folder, Watchers(run.tracker, run.log, run.deadline, progress_on()))
    write_json(run.output / FORMATS, formats)
    write_json(run.output / RELIABILITY, figures(read(run.folder / ledger.NAME)))
    timeline = run.folder / TIMELINE
    if timeline.exists():
        link_or_copy(timeline, run.output / TIMELINE)
        for name, trace in traces(read_json(timeline)).items():
            write_atomic(run.output / TRACE.format(name), trace.encode())
    summary = {key: facts[key] for key in ("steps", "tokens", "loss", "validation_loss", "tokens_per_second", "mfu")}
    losses = f"loss {_shown(facts['loss'])}, validation {_shown(facts['validation_loss'])}"
    return Outcome(f"{losses}, {facts['tokens_per_second']:,.0f} tokens/s", summary)


def _place(run: Run) -> Place:
    """Where the run stands, and what its checkpoints are bound to."""
    source = _source(run)
    return Place(
        checkpoints(run.folder),
        run.place.fingerprint,
        flops_per_token=0.0,  # each phase has its own: `supervisor.job_in_phase`
        source=source,
        same_rows=_same_rows(run, source),
        timeline=run.folder / TIMELINE,
        slice=run.place.slice,
        data=run.inputs["tokenize"],
        code=_code(run),
    )


def _code(run: Run) -> str:
    """The commit at work, with the hash of what was changed since."""
    code = read_json(run.folder / "provenance.json")["code"]
    return f"{code['commit'] or 'no commit'}{' with changes ' + code['diff'] if code['dirty'] else ''}"


def _source(run: Run) -> Path | None:
    """The checkpoint folder that `train.from` names; None without one, or where this run has its own checkpoints."""
    named = run.config.train.from_
    if named is None or steps(checkpoints(run.folder)):
        return None
    fingerprint, _, step = named.partition("@")
    folder, results = run.folder.parent / fingerprint, run.folder.parents[1]
    tokenizer = _tokens_of(run.folder)["parents"]["tokenizer"]
    if folder.exists():
        if _tokens_of(folder)["parents"]["tokenizer"] != tokenizer:
            raise UserError(f"train.from={named}: that run has another tokenizer, so its embedding means other tokens")
    elif (folder := results / IMPORTS / fingerprint).exists():
        artifact = results / "tokenizer" / tokenizer / "artifact"
        check_import(folder, run.config.model, artifact, f"train.from={named}")
    else:
        raise UserError(f"train.from={named}: there is no such run or import; `headrace runs` lists what there is")
    source = at_step(checkpoints(folder), int(step))
    run.inputs["train.from"] = source.manifest_hash
    return source.folder


def _same_rows(run: Run, source: Path | None) -> bool:
    """Whether this run reads the rows that its source has read, in the same order, so that it can go on behind them."""
    if source is None or source.parents[2].name == IMPORTS:
        return False
    theirs, ours = read_json(source.parents[1] / "stage.json"), run.place.slice
    keys = [("seed", "data"), ("recipe", "sequence_length")]
    equal = all(theirs["config"][group][key] == ours["config"][group][key] for group, key in keys)
    return equal and theirs["parents"] == ours["parents"]


def _tokens_of(run_folder: Path) -> dict[str, Any]:
    """The slice of the tokenize stage that a pretrain run read."""
    tokenize = read_json(run_folder / "stage.json")["parents"]["tokenize"]
    found: dict[str, Any] = read_json(run_folder.parents[1] / "tokenize" / tokenize / "stage.json")
    return found


def _shown(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.3f}"


def newest_step(run_folder: Path) -> int:
    """How far an interrupted run has got."""
    return max(steps(checkpoints(run_folder)), default=0)


DOOR = Door("pretrain", body, progress=newest_step)

if __name__ == "__main__":
    sys.exit(main(DOOR))
