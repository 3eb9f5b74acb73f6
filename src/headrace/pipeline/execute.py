"""The executor: walks a rank's list of actions and does what each says. It knows no schedule by name.

    F, B, I, W          run a microbatch's pass through a stage; I leaves the weights' gradients for W
    (F;B)OVERLAP_F_B    both passes in turns (`overlap.interleave`)
    SEND, RECV          start a transfer; the computation that needs it waits
    REDUCE_GRAD         hand the stage to whoever sums gradients over its copies

Where two neighbouring stages lie on one rank, the tensor is passed on. Buffers are given back when the last reader is
done: a hidden state after the backward of its stage, a gradient after the weights' gradients, which may read it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from headrace.fp8.weight_gradients import Work
from headrace.pipeline.communication import FINAL_GRADIENTS, resulting_send
from headrace.pipeline.overlap import Steps, Surroundings, interleave, run
from headrace.pipeline.schedule import Action, Kind, Schedule
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.stages import Microbatch, Results, Stage, StagePass
from headrace.pipeline.transfer import Receiving, Transfers

Place = tuple[int, int]  # stage, microbatch


class Watch(Protocol):
    """Told what the rank is at, so that whoever supervises it can say where it was."""

    def doing(self, label: str) -> None: ...
    def waiting(self, label: str) -> None: ...
    def patiently(self, label: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Plan:
    """One run through a schedule: the same on all ranks but for `feed`."""

    schedule: Schedule  # with communication
    feed: Callable[[int], Microbatch]
    train: bool  # whether there are backwards
    reduce: Callable[[int], None] | None  # called when a stage's gradient on this rank is complete
    label: str = ""  # "step 17", for messages


class Executor:
    """Runs schedules on one rank of the pipeline."""

    def __init__(
        self,
        rank: int,
        stages: Mapping[int, Stage],
        around: Surroundings,
        transfers: Transfers,
        watch: Watch,
    ) -> None:
        self._rank, self._stages, self._around, self._transfers = rank, stages, around, transfers
        self._watch = watch
        self.peak_live = 0  # microbatch passes that were kept for their backward at once, of the last run

    def run(self, plan: Plan) -> Results:
        """All actions of this rank; what its stages measured."""
        execution = _Execution(self, plan)
        for action in plan.schedule.actions[self._rank]:
            execution.do(action)
        self._watch.waiting(f"the last sends of {plan.label}")
        self._transfers.finish()
        execution.check_ended()
        self.peak_live = execution.peak_live
        return execution.results


class _Execution:
    """The state of one run."""

    def __init__(self, executor: Executor, plan: Plan) -> None:
        self._plan, self._rank, self._stages = plan, executor._rank, executor._stages
        self._around, self._transfers = executor._around, executor._transfers
        self._watch = executor._watch
        self.results = Results()
        self.peak_live = 0
        self._passes: dict[Place, StagePass] = {}
        self._posted: dict[tuple[Kind, Place], Receiving] = {}
        self._buffers: dict[tuple[Kind, Place], Tensor] = {}  # of the pool, in use
        self._handed: dict[tuple[Kind, Place], Tensor] = {}  # from a stage to its neighbour on this rank
        self._made: dict[tuple[Kind, Place], Tensor] = {}  # to be sent
        self._later: dict[Place, list[Work]] = {}
        self._starts = _starts(plan.schedule, self._rank) if self._around.record.on else {}

    def do(self, action: Action) -> None:
        """One action."""
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            self._send(action)
        elif action.kind in (Kind.RECV_F, Kind.RECV_B):
            self._receive(action)
        elif action.kind is Kind.REDUCE_GRAD:
            assert self._plan.reduce is not None
            self._doing(str(action))
            self._plan.reduce(action.stage)
        else:
            self._compute(action)

    def check_ended(self) -> None:
        """Nothing is left over."""
        left = [self._passes, self._posted, self._buffers, self._handed, self._made, self._later]
        assert not any(left), "the schedule ended with work undone; validate() refuses such a schedule"

    def _compute(self, action: Action) -> None:
        inputs = [self._input(part) for part in action.computations]
        self._doing(str(action))
        trace, record = self._around.trace, self._around.record
        if record.on:
            record.action(str(action), self._starts[str(action)])
            record.note("what arrived", inputs)
        begun = trace.now() if trace and trace.on else None
        if action.kind is Kind.OVERLAP_F_B:
            (forward, backward), (hidden, gradient) = action.parts, inputs
            ahead = self._forward(forward, hidden)  # first: both passes are live at once
            results = interleave(self._backward(backward, gradient, self._around.store.do), ahead)
            outputs = [results[1], results[0]]
        elif action.kind is Kind.F:
            outputs = [run(self._forward(action, inputs[0]))]
        elif action.kind is Kind.B:
            outputs = [run(self._backward(action, inputs[0], self._around.store.do))]
        elif action.kind is Kind.I:
            outputs = [run(self._backward(action, inputs[0], self._later.setdefault(_place(action), []).extend))]
        else:
            self._around.store.do(self._later.pop(_place(action)))
            outputs = [None]
        if trace and begun is not None:
            trace.action(str(action), begun)
        if record.on:
            record.note("output", outputs)
            if gradients := self._weight_gradients(action):
                record.note("weight gradients", gradients)
        for part, output in zip(action.computations, outputs, strict=True):
            self._output(part, output)
            self._give_back(part)

    def _forward(self, action: Action, hidden: Tensor | None) -> Steps[Tensor | None]:
        place, plan = _place(action), self._plan
        stage, given = self._stages[place[0]], plan.feed(place[1])
        self._transfers.check(given.shape(stage.config), f"{action} of {plan.label}")
        passing = StagePass(stage, self._around, given, place[1])
        if plan.train:
            self._passes[place] = passing
            self.peak_live = max(self.peak_live, len(self._passes))
        return passing.forward(hidden, self.results)

    def _backward(
        self, action: Action, gradient: Tensor | None, do: Callable[[list[Work]], None]
    ) -> Steps[Tensor | None]:
        return self._passes.pop(_place(action)).backward(gradient, do)

    def _input(self, part: Action) -> Tensor | None:
        """What the computation reads: from its own neighbour stage, or received; None at the ends of the pipeline."""
        if part.kind is Kind.W:
            return None
        key = (Kind.F if part.kind is Kind.F else Kind.B), _place(part)
        if key in self._handed:
            return self._handed.pop(key)
        posted = self._posted.pop(key, None)
        if posted is None:
            return None
        direction = "RECV_F" if part.kind is Kind.F else "RECV_B"
        label = f"{part.stage}{direction}{part.microbatch} of {self._plan.label}, for rank {posted.source}"
        self._watch.waiting(label)
        posted.work.wait()
        self._buffers[key] = posted.buffer
        return posted.buffer

    def _weight_gradients(self, action: Action) -> list[Tensor]:
        """Those that an action has added to."""
        stages = [self._stages[part.stage] for part in action.computations if part.kind in FINAL_GRADIENTS]
        parameters = [parameter for stage in stages for _, parameter in stage.named_parameters()]
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def _output(self, part: Action, output: Tensor | None) -> None:
        if output is None:
            return
        forward = part.kind is Kind.F
        stage, microbatch = _place(part)
        if resulting_send(self._plan.schedule, part, self._rank):
            self._made[(Kind.F if forward else Kind.B), (stage, microbatch)] = output
        else:
            neighbour = stage + 1 if forward else stage - 1
            self._handed[(Kind.F if forward else Kind.B), (neighbour, microbatch)] = output

    def _give_back(self, part: Action) -> None:
        place = _place(part)
        ended = {
            Kind.F: [] if self._plan.train else [Kind.F],
            Kind.B: [Kind.F, Kind.B],
            Kind.I: [Kind.F],
            Kind.W: [Kind.B],
        }[part.kind]
        for kind in ended:
            buffer = self._buffers.pop((kind, place), None)
            if buffer is not None:
                self._transfers.pool.give(buffer)

    def _send(self, action: Action) -> None:
        forward = action.kind is Kind.SEND_F
        stage, microbatch = _place(action)
        to = self._plan.schedule.rank_of(stage + 1 if forward else stage - 1, microbatch)
        self._transfers.send(self._made.pop(((Kind.F if forward else Kind.B), (stage, microbatch))), to, action.kind)

    def _receive(self, action: Action) -> None:
        forward = action.kind is Kind.RECV_F
        stage, microbatch = _place(action)
        source = self._plan.schedule.rank_of(stage - 1 if forward else stage + 1, microbatch)
        key = (Kind.F if forward else Kind.B), (stage, microbatch)
        self._posted[key] = self._transfers.receive(source, action.kind)

    def _doing(self, action: str) -> None:
        self._watch.doing(f"{action} of {self._plan.label}")


def _starts(schedule: Schedule, rank: int) -> dict[str, float]:
    """When a rank's actions start where a forward takes 1, by their names."""
    return {span.action: span.start for span in simulate(schedule, Costs()).spans if span.rank == rank}


def _place(action: Action) -> Place:
    assert action.microbatch is not None
    return action.stage, action.microbatch
