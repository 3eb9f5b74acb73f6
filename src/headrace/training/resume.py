"""What a checkpoint holds beside tensors, and how a run takes it up again, under whatever layout.

All of a run's state that changes with its steps is in `Counters`, the optimizer, the average of the weights, the
history and torch's random state; everything else is a pure function of the configuration.

Every rank reads from a checkpoint the elements that it holds, verified as they are read, and then all ranks agree: only
a checkpoint that every one of them could read is taken up, else all go on to the next older one. Where all of them are
damaged training begins again; not where one may be whole and only cannot be read now. A whole checkpoint
that is another run's (another configuration, other data, another version of the stage) is refused with what differs,
unless `checkpoint.accept_other` says otherwise; other code is warned about.
"""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.checkpoint.reader import Checkpoint, Unreadable, checkpoint_folder, open_checkpoint, steps
from headrace.errors import UserError
from headrace.parallel.assembly import MisfitError, fill, names_everywhere
from headrace.parallel.shards import Piece
from headrace.recipe.schedule import Schedule
from headrace.training.ema import Ema
from headrace.training.history import History
from headrace.training.learner import Learner
from headrace.training.optimizer import Optimizer
from headrace.training.policies import Judged

VERSION = 2
MODEL, OPTIMIZER, EMA = "model", "optimizer", "ema"
"""Kinds of tensors."""


class Refused(UserError):  # noqa: N818  what happened, not what is raised
    """A whole checkpoint, but not one of this run."""


@dataclass
class Counters:
    """Where a run stands. Rows of each sequence length are counted in an order of their own."""

    step: int = 0  # steps done, those included that were not applied
    first_position: int = 0  # the row of recipe.sequence_length at which this run began to read
    passed: list[list[int]] = field(default_factory=list)  # [step, rows] that rollbacks passed over from a step on
    seconds: float = 0.0  # spent in steps, over all restarts
    judged: Judged = field(default_factory=Judged)

    def position(self, schedule: Schedule, step: int) -> int:
        """The row at which `step` (counted from 0) begins."""
        length = schedule.at(step).sequence_length
        passed = sum(rows for at, rows in self.passed if at <= step and schedule.at(at).sequence_length == length)
        return (
            schedule.position(step) + passed + (self.first_position if length == schedule.at(0).sequence_length else 0)
        )

    def next_position(self, schedule: Schedule) -> int:
        """The row of recipe.sequence_length behind those that were read."""
        length = schedule.at(0).sequence_length
        for phase in reversed(schedule.phases):
            if phase.sequence_length == length and phase.first < self.step:
                last = min(self.step, phase.end) - 1
                return self.position(schedule, last) + schedule.at(last).sequences
        return self.first_position


@dataclass(frozen=True)
class Identity:
    """Whose checkpoints are taken up."""

    fingerprint: str
    slice: Mapping[str, Any]  # the stage's, with its version and the fingerprints of its parents; may be empty
    data: str  # manifest hash of the token shards
    code: str  # version of the code


class Parts:
    """What has tensors in a checkpoint."""

    def __init__(self, learner: Learner, optimizer: Optimizer, ema: Ema | None) -> None:
        self.learner, self.optimizer, self.ema = learner, optimizer, ema

    def owned(self) -> dict[str, list[Piece]]:
        """By kind, what this rank answers for."""
        kinds = {MODEL: self.learner.owned(), OPTIMIZER: self.optimizer.moments()}
        return {**kinds, EMA: self.ema.pieces()} if self.ema else kinds

    def held(self) -> dict[str, list[Piece]]:
        """By kind, all that this rank holds, to be loaded into."""
        return {**self.owned(), MODEL: self.learner.everything()}

    def state(self) -> dict[str, Any]:
        """What is no tensor, as JSON."""
        return {"optimizer": self.optimizer.state(), "ema": self.ema and self.ema.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.optimizer.load_state(state["optimizer"])
        if self.ema and state["ema"]:
            self.ema.load_state(state["ema"])

    def reset(self) -> None:
        """As at the beginning of a run, whatever was loaded."""
        self.learner.initialise()
        self.optimizer.reset()
        if self.ema:
            self.ema.reset()


def capture(
    counters: Counters, schedule: Schedule, parts: Parts, history: History, identity: Identity
) -> dict[str, Any]:
    """The JSON part of a checkpoint; `plan` held during its last step, for people who read it."""
    step = counters.step
    return {
        "version": VERSION,
        **asdict(identity),
        "step": step,
        "tokens": schedule.tokens_after(step),
        "position": counters.next_position(schedule),
        "plan": schedule.at(step - 1)._asdict(),
        "counters": asdict(counters),
        **parts.state(),
        "random": _random_state(parts.learner.device),
        "history": history.state(),
    }


def take_up(
    folder: Path, identity: Identity, parts: Parts, at_most: int | None, accept_other: bool, log: Logger
) -> tuple[Counters, History] | None:
    """Load the newest checkpoint under `folder`, of step `at_most` or before, that every rank can read.

    None where there is none; `parts` are as at the beginning then. Called by all ranks. Raises `Refused`, and
    `UserError` where none can be used and one may be whole, but could not be read.
    """
    learner = parts.learner
    there = [step for step in reversed(steps(folder)) if at_most is None or step <= at_most]
    there = learner.agreed_all(there)[0]
    known = {kind: names_everywhere(pieces, learner.mesh, learner.device) for kind, pieces in parts.held().items()}
    unread = ""
    for step in there:
        found, word = _tried(checkpoint_folder(folder, step), identity, parts, known, accept_other, log)
        said = [(rank, *word) for rank, word in enumerate(learner.agreed_all(word)) if word]
        if refused := next((text for _, kind, text in said if kind == "refused"), None):
            raise Refused(refused)
        if not said:
            assert found is not None
            parts.load_state(found.state)
            _set_random_state(found.state["random"], learner.device)
            return _counters(found.state), History(found.state["history"])
        for rank, kind, text in said:
            unread = unread or (text if kind == "unreadable" else "")
            log.warning(
                "checkpoint of step %d is not used, falling back to an older one: rank %d: %s", step, rank, text
            )
    if unread:
        raise UserError(
            f"{folder}: none of {len(there)} checkpoints can be used, and one may be whole: {unread}; make them "
            "readable and run it again, or move them away to train from the beginning"
        )
    if there:
        parts.reset()
        log.warning("%s: none of %d checkpoints is whole; training starts again from its beginning", folder, len(there))
    return None


def begin_from(source: Path, parts: Parts, same_rows: bool) -> Counters:
    """Start a new run from another run's checkpoint: its weights and moments; step and history anew.

    The position in the data is taken over where both read the `same_rows`, else reading starts at the beginning. Where
    there are weights alone (`headrace import`), the optimizer begins anew as well.
    """
    found, learner = open_checkpoint(source), parts.learner
    for kind, pieces in parts.held().items():
        if kind == MODEL or (kind == OPTIMIZER and kind in found.kinds):  # no average: it is one of this run's weights
            _fill(found, kind, pieces, names_everywhere(pieces, learner.mesh, learner.device))
    if OPTIMIZER in found.kinds:
        parts.optimizer.load_state(found.state["optimizer"])
    return Counters(first_position=int(found.state["position"]) if same_rows else 0)


def load_weights(found: Checkpoint, kind: str, learner: Learner) -> None:
    """Load the weights (`MODEL`) or their average (`EMA`) into the model; called by all ranks."""
    pieces = learner.everything()
    _fill(found, kind, pieces, names_everywhere(pieces, learner.mesh, learner.device))


def _tried(
    folder: Path,
    identity: Identity,
    parts: Parts,
    known: Mapping[str, set[str]],
    accept_other: bool,
    log: Logger,
) -> tuple[Checkpoint | None, list[str] | None]:
    """Load one checkpoint; without success what is to be said of it: why it is refused, or how it is damaged."""
    try:
        found = open_checkpoint(folder)
        _check(found, identity, accept_other, log)
        for kind, pieces in parts.held().items():
            if parts.ema and kind == EMA and kind not in found.kinds:
                log.warning("%s has no average of the weights; one is begun here", folder)
                parts.ema.reset()
            else:
                _fill(found, kind, pieces, known[kind])
        return found, None
    except Refused as error:
        return None, ["refused", str(error)]
    except UserError as error:
        return None, ["unreadable" if isinstance(error, Unreadable) else "damaged", str(error)]


def _check(found: Checkpoint, identity: Identity, accept_other: bool, log: Logger) -> None:
    """Refuse what is not this run's, unless `accept_other`."""
    state = found.state
    if state.get("version") != VERSION:
        raise Refused(f"{found.folder}: written by checkpoint version {state.get('version')}, this one reads {VERSION}")
    keys = ("fingerprint", "slice", "data") if state["slice"] and identity.slice else ("fingerprint",)
    theirs, ours = ({key: values[key] for key in keys} for values in (state, asdict(identity)))
    if theirs != ours:
        text = f"{found.folder}: belongs to another run than this one:\n" + "\n".join(_differences(theirs, ours))
        if not accept_other:
            raise Refused(
                f"{text}\nmove it away, continue it with train.from, or take it up all the same with "
                "checkpoint.accept_other=true"
            )
        log.warning("%s\ntaken up all the same (checkpoint.accept_other=true)", text)
    if state["code"] != identity.code:
        log.warning("%s: written by other code, %s; this is %s", found.folder, state["code"], identity.code)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line for each value that differs."""
    for key in dict.fromkeys([*theirs, *ours]):
        name, there, here = f"{prefix}{key}", theirs.get(key), ours.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _differences(there, here, f"{name}.")
        elif there != here:
            yield f"  {name.removeprefix('slice.').removeprefix('config.')}: {there!r} there, {here!r} here"


def _fill(found: Checkpoint, kind: str, pieces: list[Piece], known: set[str]) -> None:
    """Fill pieces with the elements they are of; `known` are the names that all ranks' pieces have together.

    A tensor that is missing, unknown, or of another shape or dtype is `Refused`.
    """
    try:
        fill(pieces, known, found.tensors(kind))
    except MisfitError as error:
        raise Refused(f"{error} (kind {kind})") from None


def _counters(state: Mapping[str, Any]) -> Counters:
    counters = state["counters"]
    return Counters(**{**counters, "judged": Judged(**counters["judged"])})


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
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    # `use_deterministic_algorithms` does the same, and imports torch's compiler: two seconds for every rank.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
