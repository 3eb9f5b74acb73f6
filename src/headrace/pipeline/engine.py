"""A model in training on this rank, whatever the layout: one process, or a pipeline with expert and data parallelism.

The engine cuts the model into the stages of a schedule, builds those of this rank, and offers a whole training step to
the trainer: losses of the global batch, gradients summed over all copies. Ranks that are not the first or last of their
pipeline do the same calls and get the same numbers.

Data: each data rank gets its own rows of the global batch; the engine splits them into microbatches. Every rank of a
pipeline reads the same rows itself, since the first stage needs the tokens and the last their targets.
Shapes: R rows, L tokens of a row, E experts, M layers with experts (the MTP layer last).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

from headrace.config.phases import MAIN, batches_of, layout_of, microbatch_of, sequence_length_of
from headrace.config.schema import Config
from headrace.fp8.numerics import Numerics
from headrace.model.initialisation import initialise_parameters
from headrace.parallel.assembly import exchange
from headrace.parallel.channel import Channel, InlineChannel, StreamChannel, ThreadChannel
from headrace.parallel.dispatch import make_dispatcher
from headrace.parallel.mesh import Groups, Mesh
from headrace.parallel.reduction import GradientReduction, Held
from headrace.parallel.shards import Piece, Whole
from headrace.pipeline import measured
from headrace.pipeline.communication import with_communication
from headrace.pipeline.execute import Executor, Plan, Watch
from headrace.pipeline.generators import forward_only, generate, live_bound, pick
from headrace.pipeline.overlap import Surroundings, Weights
from headrace.pipeline.record import Record
from headrace.pipeline.schedule import Schedule
from headrace.pipeline.stages import Microbatch, Results, build_stages, split_layers
from headrace.pipeline.timeline import Span
from headrace.pipeline.trace import PIECES, Trace
from headrace.pipeline.transfer import Transfers, open_transfers
from headrace.pipeline.validate import validate


@dataclass(frozen=True)
class Losses:
    """Means over the whole global batch, the same on every rank, still on the device.

    Those of tokens are means over the targets that are there. Their gradients are of the sums over these, divided by
    the number of all places: a constant, whatever the batch.
    """

    main: Tensor  # nats per token
    mtp: Tensor  # 0 without an MTP layer
    balance: Tensor  # its weight included, summed over layers
    counts: Tensor  # int64 [M, E]: tokens that chose each expert


class Unwatched:
    """Nobody supervises this process."""

    def doing(self, label: str) -> None:
        """Nothing."""

    def waiting(self, label: str) -> None:
        """Nothing."""

    def patiently(self, label: str) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()


def schedule_of(config: Config, phase: str = MAIN) -> tuple[str, str]:
    """The schedule of `parallel.schedule` in a phase of the recipe, and why: its name, and one sentence.

    It is one for the whole phase, since it says where the stages lie: `auto` picks what exists for all of its batches.
    """
    layout = layout_of(config.parallel, phase)
    if layout.schedule != "auto":
        return layout.schedule, "as configured"
    picked = [pick(layout.pipeline, number) for number in microbatches_of(config, phase)]
    return next((found for found in picked if found[0] != "dualpipe"), picked[0])


def microbatches_of(config: Config, phase: str = MAIN) -> list[int]:
    """N: microbatches of a step on each data rank, for every batch that the phase may have, ascending."""
    layout = layout_of(config.parallel, phase)
    shares = [sequences // layout.data for sequences in batches_of(config.recipe, phase)]
    return [rows // microbatch_of(layout, rows) for rows in shares]


class Engine:
    """The stages of this rank, ready to train. Made by all ranks of the world at the same time.

    `whole` says which parameters the optimizer needs in one piece; `phase` is the recipe's, which may have a layout of
    its own. With `eos`, the id that ends documents, those of a row do not see each other wherever losses are computed.
    """

    def __init__(
        self,
        config: Config,
        numerics: Numerics,
        mesh: Mesh,
        device: torch.device,
        whole: Whole,
        watch: Watch | None = None,
        phase: str = MAIN,
        eos: int | None = None,
    ) -> None:
        self.mesh, self.device, self.config = mesh, device, config.model
        layout = layout_of(config.parallel, phase)
        self._layout, self._length = layout, sequence_length_of(config.recipe, phase)
        self._name, self._reason = schedule_of(config, phase)
        self._microbatches = microbatches_of(config, phase)[0]  # of the latest step
        self.trace, self.record = Trace(mesh.pipeline_rank, device), Record()
        self.groups = Groups(mesh, timedelta(minutes=10))
        self._dtype = numerics.dtype
        dispatcher = make_dispatcher(mesh, self.groups, numerics.linear, layout)
        self.dispatch = dispatcher.backend
        schedule = self.schedule(self._microbatches)
        split = split_layers(self.config.num_hidden_layers, schedule.stages, layout.layers)
        self._layers = [len(layers) for layers in split]
        held = schedule.stages_of(mesh.pipeline_rank)
        self.model, self.stages = build_stages(self.config, numerics, dispatcher, split, held, device)
        self._last = schedule.stages - 1
        self._seed, self._eos = config.seed.init, eos
        self.initialise()
        open_transfers(self.groups, mesh, [schedule])
        self.store = self.model.store
        self.reduction = GradientReduction(self._held(schedule), mesh, self.groups, self.store, whole, device)
        self._channel: Channel = InlineChannel()
        if mesh.expert > 1:
            self._channel = StreamChannel(device) if device.type == "cuda" else ThreadChannel()
        self._around = Surroundings(self._channel, self.store, self.trace, self.record)
        self.watch: Watch = watch or Unwatched()
        self._executors: dict[torch.Size, Executor] = {}
        self._first_moe = self.config.first_k_dense_replace
        self._moe_layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers - self._first_moe
        self._copies = {index: self.mesh.copies(schedule.holders(index), experts=False) for index in held}

    def schedule(self, microbatches: int) -> Schedule:
        """The step's schedule for so many microbatches, validated."""
        return _schedule(self._name, self.mesh.pipeline, microbatches)

    def step(self, rows_RL: Tensor, mtp_weight: float, balance_weight: float, label: str) -> Losses:
        """Losses of the global batch; its gradient, summed over all copies, in `reduction.pieces`.

        `rows_RL` are this data rank's rows; `label` names the step in messages. Raises `ShapeError` where rows are
        longer or shorter than those of the phase, before anything of them is sent.
        """
        size = microbatch_of(self._layout, len(rows_RL))
        parts = torch.split(rows_RL, size)
        self._microbatches = len(parts)
        weights = Weights(1 / (len(parts) * self.mesh.data), mtp_weight, balance_weight, train=True)

        def feed(microbatch: int) -> Microbatch:
            return Microbatch(parts[microbatch], weights, eos=self._eos)

        plan = Plan(self.schedule(len(parts)), feed, True, self._reduce, label)
        with self.store.accumulating():
            results = self._run(plan, size, self._length)
            self.watch.waiting(f"the gradients of {label}")
            self.reduction.finish()
        return self._losses(results)

    @torch.no_grad()
    def measure(self, rows_RL: Tensor, label: str) -> Losses:
        """Mean losses over `rows_RL`, which all ranks have, without gradients; balance is 0."""
        results, _ = self._measured(rows_RL, False, label)
        return self._losses(results)

    @torch.no_grad()
    def token_log_probabilities(self, rows_RL: Tensor, label: str) -> Tensor:
        """log p(token | tokens before it) in nats for rows of T + 1 tokens, the same on all ranks: [R, T].

        Each row is one text, whatever documents it holds: so do models score it that know of no `eos`.
        """
        results, numbers = self._measured(rows_RL, True, label)
        scores = torch.zeros(rows_RL.shape[0], rows_RL.shape[1] - 1, dtype=torch.float32, device=self.device)
        for microbatch, values in results.log_probabilities.items():
            part, size = numbers[microbatch], len(values)
            if part is not None:
                scores[part * size : (part + 1) * size] = values
        return self._summed(scores)

    def update_router_bias(self, counts: Tensor, speed: float) -> None:
        """Move the selection biases of this rank's layers by `speed` towards an even load, given `Losses.counts`."""
        for stage in self.stages.values():
            for number, router in stage.routers().items():
                router.update_bias(counts[number - self._first_moe], speed)

    def owned(self) -> list[Piece]:
        """Every element of the model's state that this rank answers for: each belongs to one rank of the world."""
        buffers = (
            (name, buffer)
            for index, stage in self.stages.items()
            if self._copies[index][0] == self.mesh.rank
            for name, buffer in stage.named_buffers()
        )
        return [*self.reduction.pieces, *(Piece(name, buffer, tuple(buffer.shape)) for name, buffer in buffers)]

    def everything(self) -> list[Piece]:
        """All of the model's state that this rank holds, to be loaded into."""
        buffers = (pair for stage in self.stages.values() for pair in stage.named_buffers())
        return [*self.reduction.everything, *(Piece(name, buffer, tuple(buffer.shape)) for name, buffer in buffers)]

    def replicas(self) -> list[list[Piece]]:
        """What other ranks hold too, in groups that lie on the same ranks: parameters by bucket, biases by stage."""
        groups = [
            [Piece(name, buffer, tuple(buffer.shape)) for name, buffer in stage.named_buffers()]
            for index, stage in self.stages.items()
            if len(self._copies[index]) > 1
        ]
        return [*self.reduction.replicas, *(group for group in groups if group)]

    def recycle(self) -> None:
        """Forget the step's gradients, and keep their memory for the next step's."""
        self.store.recycle(parameter for stage in self.stages.values() for _, parameter in stage.named_parameters())

    def agreed_all(self, value: Any) -> list[Any]:
        """What every rank passes (JSON), in the order of ranks, on every rank."""
        return exchange(value, self.mesh, self.device)

    def roles(self) -> list[tuple[int, ...]]:
        """By rank the stages that it holds: ranks with the same do equal work."""
        schedule = self.schedule(self._microbatches)
        return [tuple(schedule.stages_of(rank // self.mesh.data)) for rank in range(self.mesh.world)]

    def initialise(self) -> None:
        """Draw the weights anew, as at the beginning."""
        for stage in self.stages.values():
            initialise_parameters(stage.named_parameters(), self.model.local_experts(), self.config, self._seed)
            for _, buffer in stage.named_buffers():
                buffer.zero_()

    def begin_timeline(self) -> None:
        """Record the next step from a moment that all ranks share."""
        self._channel.listen(self.trace.collective)
        if self.mesh.world > 1:
            distributed.barrier()
        self.trace.begin()

    def timeline(self) -> dict[str, Any]:
        """The step since `begin_timeline` on all pipeline ranks, measured and planned (`measured.timeline`).

        Nothing more is recorded afterwards: a trace that nobody reads would grow with every step.
        """
        self._channel.listen(None)
        self.trace.end()
        spans = [asdict(span) for span in self.trace.spans() if span.lane != PIECES]
        said = exchange(spans, self.mesh, self.device)
        ours = [Span(**span) for rank in range(self.mesh.pipeline) for span in said[self.mesh.at(rank, 0)]]
        return measured.timeline(self.schedule(self._microbatches), self._reason, self._layers, self.mesh, ours)

    def close(self) -> None:
        """End the channel's thread."""
        self._channel.close()

    def _held(self, schedule: Schedule) -> list[Held]:
        ends = set(schedule.holders(0)) | set(schedule.holders(self._last))
        held = []
        for index, stage in self.stages.items():
            tied = stage.mtp_embed or (stage.embed if self.config.num_nextn_predict_layers else None)
            for name, parameter in stage.named_parameters():
                experts = ".mlp.experts." in name
                both = tied is not None and parameter is tied.weight
                ranks = ends if both else schedule.holders(index)
                held.append(Held(name, parameter, index, self.mesh.copies(ranks, experts), experts))
        return held

    def _reduce(self, stage: int) -> None:
        if any(True for _ in self.stages[stage].named_parameters()):  # a stage may have no layers
            self.reduction.start(stage)

    def _run(self, plan: Plan, size: int, length: int) -> Results:
        shape = torch.Size((size, length, self.config.hidden_size))
        if shape in self._executors:
            return self._executors[shape].run(plan)
        transfers = Transfers(self.groups, self.mesh, shape, self._dtype, self.device)
        self._executors[shape] = Executor(self.mesh.pipeline_rank, self.stages, self._around, transfers, self.watch)
        # On a GPU kernels are compiled for a shape when they first see it.
        with self.watch.patiently(plan.label) if self.device.type == "cuda" else nullcontext():
            return self._executors[shape].run(plan)

    def _measured(self, rows_RL: Tensor, score: bool, label: str) -> tuple[Results, list[int | None]]:
        """A forward of all rows, shared out among the data ranks; the part of the rows that each microbatch is.

        Expert groups need the same number of microbatches on all their ranks: what is missing repeats the first part,
        and counts for nothing (None).
        """
        rows = len(rows_RL)
        size = next(s for s in range(min(microbatch_of(self._layout, rows), rows), 0, -1) if rows % s == 0)
        parts = torch.split(rows_RL, size)
        each = -(-len(parts) // self.mesh.data)
        mine = [self.mesh.data_rank * each + index for index in range(each)]
        numbers = [number if number < len(parts) else None for number in mine]
        on, off = (Weights(share, 0.0, 0.0, train=False) for share in (size / rows, 0.0))

        def feed(microbatch: int) -> Microbatch:
            number = numbers[microbatch]
            return Microbatch(parts[number or 0], off if number is None else on, score, None if score else self._eos)

        given = Microbatch(rows_RL, on, score)
        plan = Plan(_forward_only(self._name, self.mesh.pipeline, each), feed, False, None, label)
        return self._run(plan, size, given.length(self.config)), numbers

    def _losses(self, results: Results) -> Losses:
        counts = torch.zeros(self._moe_layers, self.config.n_routed_experts, dtype=torch.int64, device=self.device)
        for number, counts_E in results.counts.items():
            counts[number - self._first_moe] += counts_E
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.stack([results.losses.get(name, zero).double() for name in ("main", "mtp", "balance")])
        none = torch.zeros(2, dtype=torch.int64, device=self.device)
        targets = torch.stack([results.targets.get(name, none) for name in ("main", "mtp")])
        main, mtp, balance = self._summed(sums).unbind()
        places, there = self._summed(targets).clamp(min=1).double().unbind(1)
        return Losses(main * places[0] / there[0], mtp * places[1] / there[1], balance, self._summed(counts))

    def _summed(self, values: Tensor) -> Tensor:
        if self.mesh.world > 1:
            distributed.all_reduce(values)
        return values


@cache
def _schedule(name: str, ranks: int, microbatches: int) -> Schedule:
    schedule = with_communication(generate(name, ranks, microbatches))
    validate(schedule, live_bound(name, ranks, microbatches))
    return schedule


@cache
def _forward_only(name: str, ranks: int, microbatches: int) -> Schedule:
    # Where stages lie does not depend on the number of microbatches, as long as the schedule exists.
    return with_communication(forward_only(generate(name, ranks, 2 * ranks * 2), microbatches))
