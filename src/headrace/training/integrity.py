"""A search for silent corruption: bits that memory, a link or a processor changed without any error.

Most such faults give plausible numbers (NaN are about 1 % of them: arXiv 2605.04213), so only redundancy finds them:

    memory          weights, biases and moments are hashed after an update and right before the next: whoever differs
                    from itself is named, with the tensor. Moments have no copy anywhere (ZeRO-1), and an owner's
                    wrong weight would be given to all copies: nothing else would ever notice.
    replicas        ranks that hold the same parameters and router biases compare hashes of them.
    recomputation   a step's forward and backward run twice before the update, and must give the same bits; the first
                    entry of `pipeline.record` that differs names the rank and what it computed.

The first two are done together every `launch.verify_every` steps, the last at one random step in
`launch.recompute_every`. Whatever is found raises `CorruptionError` on all ranks, with the same line, before the update
that would use it. Not looked at: the optimizer's own arithmetic, and memory between an update that is not checked and
the one after it.

All methods are called by all ranks, with the same step (counted from 0).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import xxhash

from headrace.config.schema import LaunchConfig
from headrace.parallel.digest import digest
from headrace.parallel.shards import Piece
from headrace.pipeline.engine import Losses
from headrace.pipeline.record import Difference, Entry, first_difference
from headrace.training.learner import Learner

MEMORY, REPLICAS, RECOMPUTATION = "memory", "replicas", "recomputation"
_NAMED = 3  # tensors named in a message


@dataclass(frozen=True)
class Corruption:
    """What was found at a step (counted from 1), by which check, and the ranks it may come from: mostly one."""

    step: int
    check: str
    ranks: tuple[int, ...]
    what: str


class CorruptionError(RuntimeError):
    """The state of the run, or a result, is not what it must be; the newest checkpoint is to be taken up."""

    def __init__(self, found: Corruption) -> None:
        super().__init__(f"silent corruption found at step {found.step}: {found.what}")
        self.found = found
        self.facts: dict[str, Any] = asdict(found) | {"ranks": list(found.ranks)}
        """The same as JSON."""


class Moments(Protocol):
    """An optimizer."""

    def moments(self) -> list[Piece]: ...


class Integrity:
    """Watches over the state of `learner` and `optimizer` on this rank; `seed` (seed.data) draws the steps."""

    def __init__(self, learner: Learner, optimizer: Moments, settings: LaunchConfig, seed: int) -> None:
        self._learner, self._optimizer, self._seed = learner, optimizer, seed
        self._verify_every, self._recompute_every = settings.verify_every, settings.recompute_every
        self._sealed: dict[str, int] | None = None  # digests of the state after an update
        self.known_good = 0  # steps after which the state was last seen to be good, on all ranks

    def after_update(self, step: int) -> None:
        """Hash the state that `step` has left, where the next update is to check it."""
        if self._verify_every and (step + 1) % self._verify_every == 0:
            self._sealed = self._digests()

    def before_update(self, step: int) -> None:
        """Compare, if the update before was hashed, the state that `step` is about to change; `CorruptionError`."""
        if self._sealed is None:
            return
        sealed, self._sealed = self._sealed, None
        names = [name for name, value in self._digests().items() if value != sealed[name]]
        copies = {_key(group[0]): _joined(sealed, group) for group in self._learner.replicas()}
        said = self._learner.agreed_all([names[:_NAMED], len(names), copies])
        changed = {rank: (some, count) for rank, (some, count, _) in enumerate(said) if count}
        if changed:
            what = "; ".join(f"rank {rank}: {_listed(*found)} changed in memory" for rank, found in changed.items())
            raise CorruptionError(Corruption(step + 1, MEMORY, tuple(changed), f"{what} since the last update"))
        different = _different([digests for *_, digests in said])
        if different:
            self._name_copies(step, different, sealed)
        self.known_good = step

    def replaced(self, step: int) -> None:
        """The state is now that of a checkpoint, after `step` steps: what was hashed is no measure of it."""
        self._sealed, self.known_good = None, step

    def leads_back_to(self, found: Corruption) -> int:
        """The last step whose state `found` casts no doubt on.

        Memory is compared with what it was one step before; copies may have parted at any step since they were equal.
        """
        before = found.step - 2  # the state after `found.step - 1` steps is the one in doubt
        return min(before, self.known_good) if found.check == REPLICAS else before

    def may_lead_back_to(self, step: int) -> set[int]:
        """Where `leads_back_to` may point, for what is found from here on, after `step` steps."""
        if self._verify_every:
            return {step - 1, self.known_good}
        return {step - 1} if self._recompute_every else set()

    def recomputes(self, step: int) -> bool:
        """Whether `step` is the one of its window of `recompute_every` steps that is computed twice."""
        every = self._recompute_every
        if not every:
            return False
        drawn = xxhash.xxh3_64_intdigest(f"{self._seed} {step // every}".encode())
        return step % every == drawn % every

    def recompute(self, take: Callable[[], Losses], step: int) -> Losses:
        """What `take` returns, which computes a step's losses and gradients, after it was done twice.

        Raises `CorruptionError` where the two differ in a bit. Gradients are those of the second time, in the same
        memory; random numbers are drawn once. On a GPU only operations with one result are used meanwhile.
        """
        learner = self._learner
        with _reproducible(learner.device):
            random = _random_state(learner.device)
            losses, first = self._recorded(take)
            learner.recycle()
            _set_random_state(random, learner.device)
            _, second = self._recorded(take)
        found = first_difference(first, second, learner.mesh.rank)
        said = [Difference(**entry) for entry in self._learner.agreed_all(found and found.json) if entry]
        if said:
            earliest = min(said)
            what = f"{earliest.label} of {earliest.action} came out different"
            what = f"rank {earliest.rank}: {what} when the step was computed again"
            raise CorruptionError(Corruption(step + 1, RECOMPUTATION, (earliest.rank,), what))
        return losses

    def _recorded(self, take: Callable[[], Losses]) -> tuple[Losses, list[Entry]]:
        record = self._learner.record
        record.begin()
        losses = take()
        record.action("the step", math.inf)
        record.note("the losses", losses)
        for piece in self._learner.reduction.pieces:
            record.note(f"the summed gradient of {_key(piece)}", piece.tensor.grad)
        return losses, record.end()

    def _name_copies(self, step: int, groups: Sequence[str], sealed: Mapping[str, int]) -> None:
        """Raise which tensors of these groups of copies are not the same, and on which ranks."""
        pieces = [piece for group in self._learner.replicas() if _key(group[0]) in groups for piece in group]
        said = self._learner.agreed_all({_key(piece): sealed[_key(piece)] for piece in pieces})
        found: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for name in _different(said):
            verdict = _minority({rank: digests[name] for rank, digests in enumerate(said) if name in digests})
            found.setdefault(verdict, []).append(name)
        ranks = tuple(sorted({rank for wrong, _ in found for rank in wrong}))
        what = "; ".join(f"{how} of {_listed(names[:_NAMED], len(names))}" for (_, how), names in found.items())
        raise CorruptionError(Corruption(step + 1, REPLICAS, ranks, what))

    def _digests(self) -> dict[str, int]:
        """Of all state on this rank."""
        state = [*self._learner.everything(), *self._optimizer.moments()]
        digests = {_key(piece): digest(piece.tensor) for piece in state}
        assert len(digests) == len(state), "two pieces of one name"
        return digests


def _key(piece: Piece) -> str:
    return piece.name if piece.tensor.numel() == math.prod(piece.shape) else f"{piece.name}[{piece.start}:]"


def _joined(digests: Mapping[str, int], group: Sequence[Piece]) -> int:
    """One digest of a group's."""
    value: int = xxhash.xxh3_64_intdigest(repr([digests[_key(piece)] for piece in group]).encode())
    return value


def _different(said: Sequence[Mapping[str, int]]) -> list[str]:
    """Names of which not all ranks that say a digest say the same."""
    names = sorted({name for digests in said for name in digests})
    return [name for name in names if len({digests[name] for digests in said if name in digests}) > 1]


def _listed(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (f" and {count - len(names)} more tensors" if count > len(names) else "")


def _minority(copies: Mapping[int, int]) -> tuple[tuple[int, ...], str]:
    """The ranks that are wrong, or may be, given digests by rank that differ; and how to say so."""
    by_digest: dict[int, list[int]] = {}
    for rank, value in copies.items():
        by_digest.setdefault(value, []).append(rank)
    largest = max(by_digest.values(), key=len)
    if 2 * len(largest) <= len(copies):
        return tuple(copies), f"ranks {_ranks(copies)}, without a majority, hold different values"
    wrong = tuple(rank for rank in copies if rank not in largest)
    return wrong, f"rank{'s' * (len(wrong) > 1)} {_ranks(wrong)}: other values than the majority of copies hold"


def _ranks(ranks: Sequence[int] | Mapping[int, int]) -> str:
    return ", ".join(map(str, ranks))


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """On a GPU too, operations that have one result; some have none, and torch warns."""
    if device.type == "cpu":
        yield
        return
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
