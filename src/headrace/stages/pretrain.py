"""pretrain: token shards to a trained model, with checkpoints on the way."""

import sys
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json, write_json
from headrace.checkpoint import store
from headrace.errors import UserError
from headrace.fp8.numerics import describe
from headrace.launch.deadline import StopRequested
from headrace.launch.device import resolve, use_threads
from headrace.planning.flops import training_flops
from headrace.stages.run import Door, Outcome, Run, main
from headrace.training.progress import progress_on
from headrace.training.rows import open_rows
from headrace.training.trainer import Place, Trainer, Watchers, build_model

FORMATS = "formats.json"  # the table "what runs in which format"


def checkpoints(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def body(run: Run) -> Outcome:
    """Train from the newest whole checkpoint to the end of the recipe, or save and stop where the deadline says so."""
    config = run.config
    device = resolve(config.launch.device)
    threads = use_threads(config.launch.threads)
    run.log.info("device %s (launch.device=%s), %d threads", device, config.launch.device, threads)
    formats = describe(config.precision, device)
    for row in formats:
        run.log.info("%s: %s", row["what"].strip(), row["format"])
    flops = training_flops(config.model, config.recipe.sequence_length, mtp=bool(config.model.num_nextn_predict_layers))
    source = _source(run)
    place = Place(checkpoints(run.folder), run.place.fingerprint, device, flops, source, _same_rows(run, source))
    watchers = Watchers(run.tracker, run.log, run.deadline, progress_on())
    # The loader verifies every shard as it opens it.
    rows = open_rows(run.input("tokenize", quick=True), config)
    trainer = Trainer(config, build_model(config, device), rows, place, watchers)
    with run.deadline.polled():
        end = trainer.run()
    if not end.finished:
        raise StopRequested(f"{end.reason}, saved at step {end.step}")
    trainer.write_results(run.output)
    write_json(run.output / FORMATS, formats)
    facts = trainer.summary()
    summary = {key: facts[key] for key in ("steps", "tokens", "loss", "validation_loss", "tokens_per_second", "mfu")}
    losses = f"loss {_shown(facts['loss'])}, validation {_shown(facts['validation_loss'])}"
    return Outcome(f"{losses}, {facts['tokens_per_second']:,.0f} tokens/s", summary)


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
