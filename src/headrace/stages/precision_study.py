"""precision_study: the same model on the same data in two number formats, with paired seeds, and ablations.

The runs are trained one after another, each in a folder of its own:

    runs/<run>/checkpoints/   while it is trained; removed once it has ended
    runs/<run>/losses.jsonl   the loss of every step
    runs/<run>/tracking/      its own W&B run, in one group with the others
    runs/<run>/result.json    what came of it; a run that has one is never trained again

So a study that was stopped or killed goes on with the unfinished run from its newest checkpoint. A run that diverges is
a result, not a failure: it is kept and shown as such.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import link_or_copy, read_json, write_json
from headrace.checkpoint.reader import steps
from headrace.config.compose import group_to_dict
from headrace.evaluation.precision import headline, side_by_side, study_facts
from headrace.fp8.numerics import describe
from headrace.launch.deadline import StopRequested
from headrace.launch.device import resolve, use_threads
from headrace.planning.flops import training_flops
from headrace.recipe.schedule import Schedule
from headrace.reporting.page import write_study
from headrace.reporting.read import read_study
from headrace.stages import provenance
from headrace.stages.places import Place as StagePlace
from headrace.stages.run import Door, Outcome, Run, main
from headrace.tracking.tracker import Tracker
from headrace.training.learner import build_engine
from headrace.training.loss_log import LossLog, read_losses
from headrace.training.progress import progress_on
from headrace.training.rows import open_rows
from headrace.training.supervisor import phase_behind
from headrace.training.trainer import DivergenceError, Place, Trainer, Watchers
from headrace.training.trials import BASELINE, CANDIDATE, Trial, format_name, trials

STUDY, PAGE = "study.json", "precision_study.html"
RESULT, LOSSES, CHECKPOINTS = "result.json", "losses.jsonl", "checkpoints"
_KEPT = ("steps", "tokens", "validation_loss", "skipped_steps", "seconds", "tokens_per_second", "device", "threads")


def body(run: Run) -> Outcome:
    """Train what is missing, compare, draw."""
    planned = trials(run.config)
    device = resolve(run.config.launch.device)
    threads = use_threads(run.config.launch.threads)
    run.log.info(
        "%d runs on %s (launch.device=%s), %d threads", len(planned), device, run.config.launch.device, threads
    )
    # Said before anything is trained: a back end that cannot run a format refuses it here.
    formats = {trial.role: describe(trial.precision, device) for trial in planned}
    dataset = run.input("tokenize", quick=True)  # the loader verifies every shard as it opens it
    results = [_result(run, trial, dataset, device) for trial in planned]
    schedule = Schedule(planned[0].recipe)
    tokens = [schedule.tokens_after(step + 1) for step in range(schedule.steps)]
    facts = study_facts(results, run.config.study.smoothing, tokens)
    write_json(run.output / STUDY, {**facts, "formats": side_by_side(formats[BASELINE], formats[CANDIDATE])})
    write_study(read_study(run.output, STUDY), run.output / PAGE)
    difference = facts["difference"]
    summary = {
        "difference": difference["second_half"]["value"],
        "low": difference["second_half"]["low"],
        "high": difference["second_half"]["high"],
        "difference_at_end": difference["end"]["value"],
        "verdict": difference["verdict"],
        "seed_spread": facts["spread"]["second_half"],
    }
    return Outcome(headline(facts), summary)


def _result(run: Run, trial: Trial, dataset: Path, device: torch.device) -> dict[str, Any]:
    """What came of one run; it is trained where that is not known yet."""
    folder = run.folder / "runs" / trial.name
    if not (folder / RESULT).exists():
        write_json(folder / RESULT, _train(run, trial, dataset, device))
    manifests.discard(folder / CHECKPOINTS)
    result: dict[str, Any] = read_json(folder / RESULT)
    return result


def _train(run: Run, trial: Trial, dataset: Path, device: torch.device) -> dict[str, Any]:
    folder, name = run.folder / "runs" / trial.name, format_name(trial.precision)
    alone = replace(run.config.parallel, pipeline=1, data=1, expert=1, layers=None, schedule="auto", phases=())
    config = run.config_with(precision=trial.precision, seed=trial.seed, recipe=trial.recipe, parallel=alone)
    flops = training_flops(config.model, config.recipe.sequence_length, mtp=bool(config.model.num_nextn_predict_layers))
    place = Place(folder / CHECKPOINTS, f"{run.place.fingerprint}-{trial.name}", flops, None)
    run.log.info("%s: %s, seeds %s", trial.name, name, asdict(trial.seed))
    with _tracker(run, trial, folder) as tracker:
        diverged = False
        phase: str | None = phase_behind(folder / CHECKPOINTS, Schedule(trial.recipe))
        try:
            while phase:
                shown = LossLog(folder / LOSSES, progress_on(name=f"{trial.name} ({name})"))
                watchers = Watchers(tracker, run.log, run.deadline, shown)
                rows = open_rows(dataset, config, phase)
                engine = build_engine(config, device, phase=phase, eos=rows.eos)
                trainer = Trainer(config, engine, rows, replace(place, phase=phase), watchers)
                with run.deadline.polled():
                    end = trainer.run()
                if end.reason:
                    raise StopRequested(f"{end.reason}, {trial.name} saved at step {end.step}")
                phase = end.next_phase
        except DivergenceError as error:
            run.log.warning("%s: %s", trial.name, error)
            diverged = True
        facts = {key: value for key, value in trainer.summary().items() if key in _KEPT}
        tracker.summary(facts)
    return {
        "name": trial.name,
        "role": trial.role,
        "pair": trial.pair,
        "format": name,
        "precision": group_to_dict(trial.precision),
        "seed": asdict(trial.seed),
        "losses": read_losses(folder / LOSSES, facts["steps"]),
        "diverged_at": facts["steps"] + 1 if diverged else None,
        "machine": provenance.machine(),
        **facts,
    }


def _tracker(run: Run, trial: Trial, folder: Path) -> Tracker:
    """A W&B run for this run of the study; all of a study are one group, to be compared."""
    settings, study = run.config.tracking, f"{run.place.stage}-{run.place.fingerprint}"
    tokens = run.parents["tokenize"]
    return Tracker(
        folder / "tracking",
        run_id=f"{study}-{trial.name}",
        group=study,
        job_type=trial.role,
        config={"role": trial.role, "pair": trial.pair, "precision": group_to_dict(trial.precision)}
        | {"seed": asdict(trial.seed), "recipe": group_to_dict(trial.recipe)},
        inputs=[{"name": f"tokenize-{tokens.fingerprint}", "kind": "tokenize", "hash": run.inputs["tokenize"]}],
        backend=settings.backend,
        wandb_mode=settings.wandb,
        project=settings.project,
        entity=settings.entity,
        log=run.log,
    )


def steps_done(run_folder: Path) -> int:
    """How far an interrupted study has got: steps that are safe, and one for every run that has ended."""
    done = 0
    for folder in (run_folder / "runs").glob("*"):
        if (folder / RESULT).exists():
            done += len(read_json(folder / RESULT)["losses"]) + 1
        else:
            done += max(steps(folder / CHECKPOINTS), default=0)
    return done


def show(place: StagePlace) -> None:
    """Lay the page beside the artifact, where Snakemake may delete it."""
    page = place.folder / PAGE
    page.unlink(missing_ok=True)
    link_or_copy(place.artifact / PAGE, page)


DOOR = Door("precision_study", body, progress=steps_done, after=show)

if __name__ == "__main__":
    sys.exit(main(DOOR))
