"""convert: training checkpoint to the Hub's folder layout, checked against the checkpoint tensor by tensor."""

import sys
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json
from headrace.checkpoint import store
from headrace.conversion.check import verify_export
from headrace.conversion.export import export
from headrace.stages.pretrain import checkpoints
from headrace.stages.run import Door, Outcome, Run, main


def model_file(run: Run) -> Path:
    """The checkpoint's tensors: the last ones, or those of the kept step `convert.step`."""
    artifact, step = run.input("pretrain"), run.config.convert.step
    return (
        artifact / "model.safetensors" if step is None else store.at_step(checkpoints(artifact.parent), step).model_file
    )


def trained_state(run: Run) -> dict[str, Any]:
    """How far the converted checkpoint was trained: `tokens`, `seconds`, and `position`, the rows of data read."""
    artifact, step = run.input("pretrain"), run.config.convert.step
    if step is None:
        facts = read_json(artifact / "training.json")
        return {key: facts[key] for key in ("tokens", "seconds", "position")}
    state = store.at_step(checkpoints(artifact.parent), step).state
    return {"tokens": state["tokens"], **{key: state["counters"][key] for key in ("seconds", "position")}}


def body(run: Run) -> Outcome:
    """Export, then read everything back by another path and compare."""
    source, config = model_file(run), run.config.convert
    tokenizer = run.input("tokenizer")
    made = export(
        source, run.config.model, tokenizer, run.output, config.dtype, config.max_shard_bytes, config.unaligned
    )
    verify_export(run.output, source, run.config.model)
    summary = {"tensors": made.tensors, "shards": made.shards, "bytes": made.total_size, "dtype": config.dtype}
    line = f"{made.tensors:,} tensors, {made.total_size / 1e6:,.1f} MB in {config.dtype.upper()}, verified"
    return Outcome(line, summary)


DOOR = Door("convert", body, algorithm="sha256")

if __name__ == "__main__":
    sys.exit(main(DOOR))
