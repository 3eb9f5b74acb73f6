"""Overlap of two microbatches: what runs under which collective, what it hides, and what is counted once."""

import time
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
import torch
from torch import distributed

from headrace.config.schema import RecomputeConfig
from headrace.fp8.numerics import Numerics
from headrace.model.initialisation import initialise_parameters
from headrace.parallel.channel import DelayedChannel, ThreadChannel
from headrace.parallel.dispatch import make_dispatcher
from headrace.parallel.mesh import Groups, Mesh
from headrace.pipeline.overlap import Surroundings, Weights, interleave, run
from headrace.pipeline.schedule import Kind
from headrace.pipeline.stages import Microbatch, Results, StagePass, build_stages, split_layers
from headrace.pipeline.timeline import COMMUNICATION, COMPUTE, Span
from headrace.pipeline.trace import PIECES
from pipeline_runs import ALPHA, CPU, MTP, configuration, engine, figures, gradients, layout, local, rows
from ranks import run_ranks

pytestmark = pytest.mark.alone

HERE = "pipeline/test_overlap.py"
COLLECTIVES = {"combine'": "attention", "dispatch": "experts'", "dispatch'": "experts", "combine": "attention'"}
"""What of the other microbatch hides what (order of DeepSeek-V3's own trace; report, figure 4)."""


def steps_of(name, count, order):
    for number in range(count):
        order.append(f"{name}{number}")
        yield
    return name


@pytest.mark.parametrize(("backward", "forward"), [(2, 2), (3, 1), (0, 2), (0, 0)])
def test_interleaving_takes_turns_backward_first(backward, forward):
    order = []
    assert interleave(steps_of("b", backward, order), steps_of("f", forward, order)) == ("b", "f")
    turns = sorted([(n, "b") for n in range(backward)] + [(n, "f") for n in range(forward)])
    assert order == [f"{name}{number}" for number, name in turns]


def traced(rank, world):
    """Spans of one step of DualPipe whose two stages have two layers with experts each."""
    config = configuration(**layout("dualpipe", 2, 2) | {"layers": (3, 1)})
    running = engine(config, Numerics("fp32"), rank)
    running.begin_timeline()
    running.step(local(running, rows(config)), MTP, ALPHA, "step 1")
    running.close()
    return [asdict(span) for span in running.trace.spans()]


def test_each_collective_of_a_pair_encloses_computation_of_the_other_microbatch():
    for said in run_ranks(4, HERE, "traced"):
        spans = [Span(**span) for span in said]
        pairs = [span for span in spans if span.lane == COMPUTE and span.action.endswith(Kind.OVERLAP_F_B)]
        assert pairs
        for pair in pairs:
            inside = [span for span in spans if pair.start <= span.start and span.end <= pair.end]
            collectives = [span for span in inside if span.lane == COMMUNICATION]
            assert sorted(span.action for span in collectives) == sorted([*COLLECTIVES] * 2)
            pieces = [span for span in inside if span.lane == PIECES]
            for span in collectives:
                under = [p.action for p in pieces if span.start <= p.start and p.end <= span.end]
                assert COLLECTIVES[span.action] in under, (span.action, under)
            order = [
                span.action
                for span in sorted(inside, key=lambda span: span.start)
                if span.action in {*COLLECTIVES, *COLLECTIVES.values()}
            ]
            first = ["combine'", "attention", "dispatch", "experts'", "dispatch'", "experts", "combine", "attention'"]
            assert order == first * 2


class _Pair:
    """A stage of four layers with experts on other ranks; its forward, its backward, and both overlapped."""

    def __init__(self, rank, recompute):
        config = configuration(recipe={"sequence_length": 128}, **layout("1f1b", 1, 2))
        mesh = Mesh.of(config.parallel, rank)
        groups, numerics = Groups(mesh, timedelta(minutes=1)), Numerics("fp32", None, recompute)
        dispatcher = make_dispatcher(mesh, groups, numerics.linear, config.parallel)
        model, stages = build_stages(config.model, numerics, dispatcher, split_layers(4, 1, None), [0], CPU)
        self.stage, self.store, self.channel = stages[0], model.store, ThreadChannel()
        initialise_parameters(self.stage.named_parameters(), model.local_experts(), config.model, 0)
        for _, buffer in self.stage.named_buffers():
            buffer.zero_()
        self.given = Microbatch(rows(config, rank, count=1), Weights(1, MTP, ALPHA, train=True))
        self.delay(0)

    def delay(self, seconds):
        channel = DelayedChannel(self.channel, seconds) if seconds else self.channel
        self.around = Surroundings(channel, self.store)

    def forward(self):
        passing, results = StagePass(self.stage, self.around, self.given, 0), Results()
        return passing, results, passing.forward(None, results)

    def timed(self):
        """Seconds of a forward alone, a backward alone, and an overlapped pair."""
        passing, _, forward = self.forward()
        first = _seconds(lambda: run(forward))
        ahead, _, forward = self.forward()
        both = _seconds(lambda: interleave(passing.backward(None, self.store.do), forward))
        return first, _seconds(lambda: run(ahead.backward(None, self.store.do))), both


def _seconds(work):
    distributed.barrier()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def delayed(rank, world):
    """The least seconds of several turns, with delays that take two thirds of what the computation does."""
    pair = _Pair(rank, Numerics("fp32").recompute)
    pair.timed()
    computing = torch.tensor(min(sum(pair.timed()[:2]) for _ in range(3)), dtype=torch.float64)
    distributed.all_reduce(computing, distributed.ReduceOp.MAX)
    delay = computing.item() / 24
    pair.delay(delay)
    turns = [pair.timed() for _ in range(10)]
    pair.channel.close()
    delays = 4 * 4 * delay  # 4 layers x dispatch, combine and both backwards
    return {
        "computing": computing.item(),
        "delays": delays,
        "least": [min(times) for times in zip(*turns, strict=True)],
    }


def counted(rank, world):
    """Counts, losses and gradient of one microbatch on two ranks, with and without recomputation."""
    found = []
    for on in (False, True):
        pair = _Pair(rank, RecomputeConfig(norms=on, up_projections=on, swiglu=on))
        passing, results, forward = pair.forward()
        run(forward)
        run(passing.backward(None, pair.store.do))
        pair.channel.close()
        found.append(
            {
                "counts": {layer: counts.tolist() for layer, counts in results.counts.items()},
                "losses": {name: value.item().hex() for name, value in results.losses.items()},
                "gradients": {name: p.grad.double().sum().item().hex() for name, p in pair.stage.named_parameters()},
            }
        )
    return found


def two(rank, world):
    return delayed(rank, world), counted(rank, world)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, HERE, "two")


def test_a_pair_hides_the_delays_of_its_collectives(ranks):
    for found, _ in ranks:
        forward, backward, both = found["least"]
        # Apart, a backward still hides one of its two collectives: dispatch' runs under the experts' weight gradients.
        assert forward + backward > 0.75 * found["delays"] + 0.8 * found["computing"]
        assert both < forward + backward - found["delays"] / 4, found  # half and more is hidden on an idle machine


def test_counts_and_balance_are_the_same_bits_with_recomputation_on_several_ranks(ranks):
    for _, (kept, again) in ranks:
        assert kept == again
        assert {layer: sum(counts) for layer, counts in kept["counts"].items()} == dict.fromkeys("1234", 128 * 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_v", "dualpipe_v"])
def test_recomputation_changes_no_bit_and_counts_nothing_twice(schedule, precision):
    config, found = configuration(precision, schedule=schedule), []
    fp8 = config.precision.fp8 and replace(config.precision.fp8, swiglu_input_cache="bf16")  # E4M3 would be other bits
    for on in (False, True):
        recompute = RecomputeConfig(norms=on, up_projections=on, swiglu=on)
        numerics = Numerics.resolve(replace(config.precision, fp8=fp8, recompute=recompute), CPU)
        running = engine(config, numerics)
        losses = running.step(rows(config), MTP, ALPHA, "step 1")
        assert losses.counts.sum(1).tolist() == [8 * 16 * 3] * 4
        found.append((figures(losses), losses.counts, gradients(running)))
    (kept, kept_counts, kept_gradients), (again, again_counts, again_gradients) = found
    assert kept == again
    assert torch.equal(kept_counts, again_counts)
    different = [name for name in kept_gradients if not torch.equal(kept_gradients[name], again_gradients[name])]
    assert not different
