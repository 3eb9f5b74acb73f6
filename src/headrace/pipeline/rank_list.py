"""The list of one rank's actions in the making; the generators' pencil.

A generator says "forward of chunk 1", and this knows which microbatch is next. A chunk is a pipeline stage and the
microbatches that pass it on this rank. Where none is left, nothing is added. Weight gradients that were put off are
remembered here, oldest first. Whether the list makes sense is not asked: see `pipeline/validate.py`.
"""

from collections import deque

from headrace.pipeline.schedule import Action, Kind, overlap


class RankList:
    """Chunks are numbered as given: (pipeline stage, the microbatches that pass it on this rank, in order)."""

    def __init__(self, *chunks: tuple[int, range]) -> None:
        self._actions: list[Action] = []
        self._stages = [stage for stage, _ in chunks]
        self._to_forward = [deque(microbatches) for _, microbatches in chunks]
        self._to_backward = [deque(microbatches) for _, microbatches in chunks]
        self._deferred: deque[Action] = deque()  # weight gradients whose input gradient has run, oldest first

    def _take(self, kind: Kind, chunk: int, queue: list[deque[int]]) -> Action | None:
        return Action(self._stages[chunk], kind, queue[chunk].popleft()) if queue[chunk] else None

    def _add(self, action: Action | None) -> bool:
        if action is not None:
            self._actions.append(action)
        return action is not None

    def forwards_left(self, chunk: int) -> int:
        return len(self._to_forward[chunk])

    def forward(self, chunk: int) -> bool:
        return self._add(self._take(Kind.F, chunk, self._to_forward))

    def forwards(self, chunk: int, count: int) -> None:
        for _ in range(count):
            self.forward(chunk)

    def backward(self, chunk: int) -> bool:
        return self._add(self._take(Kind.B, chunk, self._to_backward))

    def input_gradient(self, chunk: int) -> bool:
        action = self._take(Kind.I, chunk, self._to_backward)
        if action is not None:
            self._deferred.append(Action(action.stage, Kind.W, action.microbatch))
        return self._add(action)

    def weight_gradient(self, chunk: int | None = None) -> bool:
        """The oldest deferred one, of all or of one chunk."""
        wanted = (w for w in self._deferred if chunk is None or w.stage == self._stages[chunk])
        oldest = next(wanted, None)
        if oldest is not None:
            self._deferred.remove(oldest)
        return self._add(oldest)

    def split_backward(self, chunk: int) -> None:
        if self.input_gradient(chunk):
            self.weight_gradient(chunk)

    def pair(self, forward: int, backward: int) -> None:
        parts = self._take(Kind.F, forward, self._to_forward), self._take(Kind.B, backward, self._to_backward)
        assert parts[0] is not None and parts[1] is not None, "the eight steps count their pairs"
        self._add(overlap(parts[0], parts[1]))

    def finish(self) -> tuple[Action, ...]:
        """The list; weight gradients that are still deferred come last."""
        while self.weight_gradient():
            pass
        assert not any(self._to_forward) and not any(self._to_backward), "a microbatch was left over"
        return tuple(self._actions)
