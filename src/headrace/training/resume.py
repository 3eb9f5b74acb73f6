"""What a checkpoint holds beside weights and moments, and how a run takes it up again.

All of a run's state that changes with its steps is in `Counters`, the optimizer, the history and torch's random
state; everything else is a pure function of the configuration.
"""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.artifacts.tensors import open_tensors
from headrace.checkpoint.store import Checkpoint
from headrace.errors import UserError
from headrace.parallel.assembly import fill, names_everywhere
from headrace.parallel.shards import Piece
from headrace.recipe.schedule import Step
from headrace.training.history import History
from headrace.training.learner import Learner
from headrace.training.optimizer import Optimizer

VERSION = 1


@dataclass
class Counters:
    """Where a run stands."""

    step: int = 0  # steps done, skipped ones included
    position: int = 0  # the next training row, in the order of the data
    first_position: int = 0  # where this run began to read
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    seconds: float = 0.0  # spent in steps, over all restarts


def capture(
    counters: Counters,
    tokens: int,
    plan: Step,
    optimizer: Optimizer,
    history: History,
    fingerprint: str,
    device: torch.device,
) -> dict[str, Any]:
    """The JSON part of a checkpoint after `tokens` tokens; `plan` held during its last step, for people who read it."""
    return {
        "version": VERSION,
        "fingerprint": fingerprint,
        "step": counters.step,
        "tokens": tokens,
        "plan": asdict(plan),
        "counters": asdict(counters),
        "optimizer": optimizer.state(),
        "random": _random_state(device),
        "history": history.state(),
    }


def resume(found: Checkpoint, learner: Learner, optimizer: Optimizer, fingerprint: str) -> tuple[Counters, History]:
    """Take a run up at one of its own checkpoints; one of another run or version is a `UserError`."""
    state = found.state
    if state.get("version") != VERSION:
        raise UserError(
            f"{found.folder}: written by checkpoint version {state.get('version')}, this one reads {VERSION}"
        )
    if state.get("fingerprint") != fingerprint:
        raise UserError(
            f"{found.folder}: belongs to run {state.get('fingerprint')}, not {fingerprint}; "
            "move it away, or continue it with train.from"
        )
    _read_tensors(found, learner, optimizer)
    _set_random_state(state["random"], learner.device)
    return Counters(**state["counters"]), History(state["history"])


def begin_from(source: Checkpoint, learner: Learner, optimizer: Optimizer, same_rows: bool) -> Counters:
    """Start a new run from another run's checkpoint: its weights and moments; step and history anew.

    The position in the data is taken over where both read the `same_rows`, else reading starts at the beginning.
    """
    _read_tensors(source, learner, optimizer)
    position = int(source.state["counters"]["position"]) if same_rows else 0
    return Counters(position=position, first_position=position)


def _read_tensors(found: Checkpoint, learner: Learner, optimizer: Optimizer) -> None:
    _fill(learner.everything(), found.model_file, learner)
    _fill(optimizer.moments(), found.optimizer_file, learner)
    optimizer.load_state(found.state["optimizer"])


def _fill(pieces: list[Piece], path: Path, learner: Learner) -> None:
    known = names_everywhere(pieces, learner.mesh, learner.device)
    with open_tensors(path) as file:
        fill(pieces, known, file.get, file.keys(), str(path))


def _random_state(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}


def _set_random_state(states: Mapping[str, str], device: torch.device) -> None:
    torch.set_rng_state(_bytes(states["cpu"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU, where it costs nothing, refuse operations whose result may differ from run to run."""
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(device.type == "cpu")
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
