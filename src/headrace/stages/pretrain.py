"""pretrain: token shards to a trained model, with checkpoints on the way."""

import sys
from pathlib import Path
from typing import Any

from headrace.artifacts.files import link_or_copy, read_json, write_json
from headrace.checkpoint import store
from headrace.errors import UserError
from headrace.fp8.numerics import describe
from headrace.launch.deadline import StopRequested
from headrace.launch.device import resolve
from headrace.launch.start import started
from headrace.launch.supervisor import supervise
from headrace.pipeline.engine import schedule_of
from headrace.planning.flops import training_flops
from headrace.stages.run import Door, Outcome, Run, main
from headrace.training import on_rank
from headrace.training.on_rank import Job, train
from headrace.training.progress import progress_on
from headrace.training.trainer import Place, Watchers

FORMATS = "formats.json"  # the table "what runs in which format"
TIMELINE = "timeline.json"  # the planned and the measured timeline of one step


def checkpoints(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def body(run: Run) -> Outcome:
    """Train from the newest whole checkpoint to the end of the recipe, or save and stop where the deadline says so."""
    config = run.config
    device = resolve(config.launch.device)
    formats = describe(config.precision, device)
    for row in formats:
        run.log.info("%s: %s", row["what"].strip(), row["format"])
    name, reason = schedule_of(config)
    run.log.info("pipeline schedule %s: %s", name, reason)
    flops = training_flops(config.model, config.recipe.sequence_length, mtp=bool(config.model.num_nextn_predict_layers))
    source = _source(run)
    timeline = run.folder / TIMELINE
    place = Place(checkpoints(run.folder), run.place.fingerprint, flops, source, _same_rows(run, source), timeline)
    job = Job(config, run.input("tokenize", quick=True), run.output, place)
    world = config.parallel.pipeline * config.parallel.data
    facts = _on_ranks(run, job, world) if world > 1 else _here(run, job)
    write_json(run.output / FORMATS, formats)
    if timeline.exists():
        link_or_copy(timeline, run.output / TIMELINE)
    summary = {key: facts[key] for key in ("steps", "tokens", "loss", "validation_loss", "tokens_per_second", "mfu")}
    losses = f"loss {_shown(facts['loss'])}, validation {_shown(facts['validation_loss'])}"
    return Outcome(f"{losses}, {facts['tokens_per_second']:,.0f} tokens/s", summary)


def _here(run: Run, job: Job) -> dict[str, Any]:
    """Train in this process."""
    with run.deadline.polled():
        return train(job, Watchers(run.tracker, run.log, run.deadline, progress_on()))


def _on_ranks(run: Run, job: Job, world: int) -> dict[str, Any]:
    """Start the ranks, pass on what the first of them tells, and wait for all."""
    folder, launch = run.folder / "ranks", run.config.launch
    folder.mkdir(exist_ok=True)
    job.write(folder / "job.json")
    progress, facts = progress_on(), dict[str, Any]()

    def on_message(rank: int, kind: str, payload: Any) -> None:
        if kind == on_rank.LOG:
            run.log.log(*payload)
        elif kind == on_rank.METRICS:
            run.tracker.log(*payload)
        elif kind == on_rank.PROGRESS:
            progress.update(*payload)
        elif kind == on_rank.SUMMARY:
            facts.update(payload)

    program = ["-m", on_rank.__name__, str(folder / "job.json")]
    try:
        with run.deadline.polled(), started(program, world, launch.start, folder) as ranks:
            end = supervise(ranks, on_message, run.deadline, launch.hang_seconds)
    finally:
        progress.close()
    if end.stopped:
        raise StopRequested(end.stopped)
    return facts


def _source(run: Run) -> Path | None:
    """The checkpoint folder that `train.from` names; None without one, or where this run has its own checkpoints."""
    named = run.config.train.from_
    if named is None or store.steps(checkpoints(run.folder)):
        return None
    fingerprint, _, step = named.partition("@")
    folder = run.folder.parent / fingerprint
    if not folder.exists():
        raise UserError(f"train.from={named}: there is no run {folder}; `headrace runs` lists what there is")
    if _tokens_of(folder)["parents"]["tokenizer"] != _tokens_of(run.folder)["parents"]["tokenizer"]:
        raise UserError(f"train.from={named}: that run has another tokenizer, so its embedding means other tokens")
    source = store.at_step(checkpoints(folder), int(step))
    run.inputs["train.from"] = source.manifest_hash
    return source.folder


def _same_rows(run: Run, source: Path | None) -> bool:
    """Whether this run reads the rows that its source has read, in the same order, so that it can go on behind them."""
    if source is None:
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
    return max(store.steps(checkpoints(run_folder)), default=0)


DOOR = Door("pretrain", body, progress=newest_step)

if __name__ == "__main__":
    sys.exit(main(DOOR))
