"""The files of a finished run, as the next stages read them.

checkpoint/             hard links of the last checkpoint's slices.json and files of the kinds model (parameters and
                        router biases, FP32) and ema (their average), to be read by `checkpoint.reader.tensors_of`
training.json           what was trained and how fast: the keys are those of `Results.summary`
metrics.jsonl           one line per logged step: {"step", "tokens", metric: value, ...}, each step once
expert_load.json        {"steps", "tokens", "layers": {layer: [[share per expert] per step]},
                        "maxvio": {layer: [per step]}, "maxvio_mean": [per step]}
agreement.safetensors   `tokens` int64 [R, T+1], held-out rows, and `log_probabilities` float32 [R, T] that the
                        model in memory gives them at the end of the run, for comparison with what is reloaded
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headrace.artifacts.files import link_or_copy, write_atomic, write_json
from headrace.artifacts.tensors import save_tensors
from headrace.checkpoint.reader import Checkpoint
from headrace.checkpoint.slices import TABLE
from headrace.training.history import History, max_violation, shares


@dataclass(frozen=True)
class Results:
    """Everything that `write_results` writes."""

    checkpoint: Checkpoint
    history: History
    summary: dict[str, Any]
    layers: list[str]  # names of the MoE layers, in the order of the counts
    tokens_after: Callable[[int], int]  # so many steps
    agreement_tokens: Tensor  # int64 [R, T+1]
    agreement_log_probabilities: Tensor  # float32 [R, T]


def write_results(folder: Path, results: Results) -> None:
    """Write the files listed above into `folder`, which exists."""
    weights = folder / "checkpoint"
    if weights.exists():  # of an attempt that was ended after all was trained
        shutil.rmtree(weights)
    weights.mkdir()
    for path in sorted(results.checkpoint.folder.iterdir()):
        if path.name == TABLE or path.name.startswith(("model-", "ema-")):
            link_or_copy(path, weights / path.name)
    write_json(folder / "training.json", results.summary)
    lines = (json.dumps(row, allow_nan=False) + "\n" for row in results.history.rows)
    write_atomic(folder / "metrics.jsonl", "".join(lines).encode())
    write_json(folder / "expert_load.json", expert_load(results))
    save_tensors(
        folder / "agreement.safetensors",
        {"tokens": results.agreement_tokens, "log_probabilities": results.agreement_log_probabilities},
    )


def expert_load(results: Results) -> dict[str, Any]:
    """The content of expert_load.json."""
    history = results.history
    by_step = [shares(load) for load in history.loads]
    violations = [max_violation(load) for load in history.loads]
    layers = list(enumerate(results.layers))
    return {
        "steps": history.load_steps,
        "tokens": [results.tokens_after(step) for step in history.load_steps],
        "layers": {name: [[round(share, 6) for share in load[i]] for load in by_step] for i, name in layers},
        "maxvio": {name: [round(values[i], 6) for values in violations] for i, name in layers},
        "maxvio_mean": [round(sum(values) / len(values), 6) for values in violations if values],
    }
