"""pretrain: token shards to a trained model, with checkpoints on the way."""

import sys
from pathlib import Path

from headrace.checkpoint import store
from headrace.errors import UserError
from headrace.launch.deadline import StopRequested
from headrace.launch.device import resolve, use_threads
from headrace.planning.flops import training_flops
from headrace.stages.run import Door, Outcome, Run, main
from headrace.training.progress import progress_on
from headrace.training.rows import open_rows
from headrace.training.trainer import Place, Trainer, Watchers, build_model


def checkpoints(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def body(run: Run) -> Outcome:
    """Train from the newest whole checkpoint to the end of the recipe, or save and stop where the deadline says so."""
    config = run.config
    device = resolve(config.launch.device)
    threads = use_threads(config.launch.threads)
    run.log.info("device %s (launch.device=%s), %d threads", device, config.launch.device, threads)
    flops = training_flops(config.model, config.recipe.sequence_length, mtp=bool(config.model.num_nextn_predict_layers))
    place = Place(checkpoints(run.folder), run.place.fingerprint, device, flops, _source(run))
    watchers = Watchers(run.tracker, run.log, run.deadline, progress_on())
    # The loader verifies every shard as it opens it.
    rows = open_rows(run.input("tokenize", quick=True), config)
    trainer = Trainer(config, build_model(config, device), rows, place, watchers)
    with run.deadline.polled():
        end = trainer.run()
    if not end.finished:
        raise StopRequested(f"{end.reason}, saved at step {end.step}")
    trainer.write_results(run.output)
    facts = trainer.summary()
    summary = {key: facts[key] for key in ("steps", "tokens", "loss", "validation_loss", "tokens_per_second", "mfu")}
    losses = f"loss {facts['loss']:.3f}, validation {facts['validation_loss']:.3f}"
    return Outcome(f"{losses}, {facts['tokens_per_second']:,.0f} tokens/s", summary)


def _source(run: Run) -> Path | None:
    """The checkpoint folder that `train.from` names, under this results folder."""
    named = run.config.train.from_
    if named is None:
        return None
    fingerprint, _, step = named.partition("@")
    folder = run.folder.parent / fingerprint
    if not folder.exists():
        raise UserError(f"train.from={named}: there is no run {folder}; `headrace runs` lists what there is")
    return store.at_step(checkpoints(folder), int(step)).folder


def newest_step(run_folder: Path) -> int:
    """How far an interrupted run has got."""
    return max(store.steps(checkpoints(run_folder)), default=0)


DOOR = Door("pretrain", body, progress=newest_step)

if __name__ == "__main__":
    sys.exit(main(DOOR))
