"""convert: training checkpoint to the Hub's folder layout, checked against the checkpoint tensor by tensor."""

import sys
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json
from headrace.checkpoint.reader import Checkpoint, at_step
from headrace.config.schema import ModelConfig
from headrace.conversion.check import verify_export
from headrace.conversion.export import export
from headrace.recipe.model import final_model, model_in_phase
from headrace.recipe.schedule import Schedule
from headrace.stages.pretrain import checkpoints
from headrace.stages.run import Door, Outcome, Run, main

KINDS = {"final": "model", "ema": "ema"}
"""The kind of a checkpoint's tensors that `convert.weights` names."""


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
    made = export(
        source,
        model,
        run.input("tokenizer"),
        run.output,
        config.dtype,
        config.max_shard_bytes,
        config.unaligned,
        kind(run),
    )
    verify_export(run.output, source, model, kind(run))
    summary = {"tensors": made.tensors, "shards": made.shards, "bytes": made.total_size, "dtype": config.dtype}
    averaged = ", the moving average of the weights" if config.weights == "ema" else ""
    line = f"{made.tensors:,} tensors, {made.total_size / 1e6:,.1f} MB in {config.dtype.upper()}{averaged}, verified"
    return Outcome(line, summary)


def _kept(run: Run) -> Checkpoint | None:
    """The checkpoint of the kept step, if one is named; its tensors are verified as they are read."""
    step = run.config.convert.step
    if step is None:
        return None
    return at_step(checkpoints(run.input("pretrain", quick=True).parent), step)


DOOR = Door("convert", body, algorithm="sha256")

if __name__ == "__main__":
    sys.exit(main(DOOR))
