"""The executor: what it keeps and receives into at once, how often it multiplies, and what it refuses."""

from collections import Counter
from datetime import timedelta
from itertools import groupby
from unittest.mock import patch

import pytest
import torch
from torch import distributed

from headrace.fp8.numerics import Numerics
from headrace.model.dispatch import LocalDispatcher
from headrace.model.initialisation import initialise_parameters
from headrace.parallel.channel import InlineChannel
from headrace.parallel.mesh import Groups, Mesh
from headrace.pipeline.communication import with_communication
from headrace.pipeline.engine import Unwatched
from headrace.pipeline.execute import Executor, Plan
from headrace.pipeline.generators import forward_only, generate
from headrace.pipeline.overlap import Surroundings, Weights
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.stages import Microbatch, build_stages, split_layers
from headrace.pipeline.transfer import ShapeError, Transfers, open_transfers
from pipeline_runs import ALPHA, CPU, MTP, SCHEDULES, configuration, engine, layout, numerics_of, rows
from ranks import run_ranks

pytestmark = pytest.mark.alone

HERE = "pipeline/test_execute.py"
PEAKS = {f"{name} PP{ranks} training": (name, ranks, True) for name in SCHEDULES for ranks in (2, 4)}
PEAKS |= {f"{name} PP4 validation": (name, 4, False) for name in ("1f1b", "zb_v", "dualpipe")}
PEAKS["interleaved_1f1b PP2 training"] = "interleaved_1f1b", 2, True


def _schedule(name, ranks, train):
    schedule = generate(name, ranks, 2 * ranks + 4)
    return with_communication(schedule if train else forward_only(schedule, 7))


def peaks(rank, world):
    """By case: the pipeline rank, and passes kept and receive buffers used at once on it."""
    found = {}
    for case, (name, ranks, train) in PEAKS.items():
        print(case, flush=True)
        config = configuration(model={"num_hidden_layers": 2}, **layout(name, ranks) | {"data": world // ranks})
        schedule, mesh = _schedule(name, ranks, train), Mesh.of(config.parallel, rank)
        groups, numerics = Groups(mesh, timedelta(minutes=1)), Numerics("fp32")
        split = split_layers(config.model.num_hidden_layers, schedule.stages, None)
        held = schedule.stages_of(mesh.pipeline_rank)
        model, stages = build_stages(config.model, numerics, LocalDispatcher(numerics.linear), split, held, CPU)
        for stage in stages.values():
            initialise_parameters(stage.named_parameters(), model.local_experts(), config.model, 0)
        open_transfers(groups, mesh, [schedule])
        given = Microbatch(rows(config, count=1), Weights(1, MTP, ALPHA, train))
        transfers = Transfers(groups, mesh, given.shape(config.model), numerics.dtype, CPU)
        around = Surroundings(InlineChannel(), model.store)
        executor = Executor(mesh.pipeline_rank, stages, around, transfers, Unwatched())
        executor.run(Plan(schedule, lambda _, given=given: given, train, lambda _: None, case))
        found[case] = mesh.pipeline_rank, executor.peak_live, transfers.pool.peak
    return found


@pytest.fixture(scope="module")
def peaks_of_ranks():
    return run_ranks(4, HERE, "peaks")


@pytest.mark.parametrize("case", PEAKS)
def test_live_passes_and_receive_buffers_are_those_of_the_simulation(peaks_of_ranks, case):
    name, ranks, train = PEAKS[case]
    expected = simulate(_schedule(name, ranks, train), Costs())
    for result in peaks_of_ranks:
        rank, live, buffers = result[case]
        assert buffers == expected.receive_buffers[rank]
        if train:
            assert live == expected.live_activations[rank]


class Noting(Unwatched):
    """Writes down the actions of a step."""

    def __init__(self, said):
        self._said = said

    def doing(self, label):
        self._said.append(label.removesuffix(" of step 1"))


class Awaited:
    """A sum under way that tells when it is waited for."""

    def __init__(self, work, said):
        self._work, self._said = work, said

    def wait(self):
        self._said.append("wait")
        self._work.wait()


def reductions(rank, world):
    """What a step of DualPipe does on this rank, in order: actions, sums begun, waits for them; each once in a row."""
    said, reduce = [], distributed.reduce

    def noted(*arguments, async_op, **named):
        said.append("reduce" if async_op else "reduce and wait")
        return Awaited(reduce(*arguments, async_op=async_op, **named), said)

    config = configuration(model={"num_hidden_layers": 2}, **layout("dualpipe", world))
    running = engine(config, Numerics("fp32"), rank, watch=Noting(said))
    with patch.object(distributed, "reduce", noted):
        running.step(rows(config, count=4), MTP, ALPHA, "step 1")
    running.close()
    return [entry for entry, _ in groupby(said)]


def test_the_higher_stages_gradients_are_summed_under_the_tail_and_waited_for_at_the_end():
    first, second = run_ranks(2, HERE, "reductions")
    assert first[-8:] == ["1B3", "1REDUCE_GRAD", "reduce", "0I1", "0W1", "0REDUCE_GRAD", "reduce", "wait"]
    assert second[-8:] == ["1B1", "1REDUCE_GRAD", "reduce", "0I3", "0W3", "0REDUCE_GRAD", "reduce", "wait"]
    assert (first.count("reduce"), first.count("wait")) == (second.count("reduce"), second.count("wait")) == (2, 1)


class Counting:
    """Another's `Gemms`, counting: calls by (kind, address of the weight's operand or of its gradient)."""

    def __init__(self, gemms, calls):
        self._gemms, self._calls = gemms, calls

    def __getattr__(self, name):
        return getattr(self._gemms, name)

    def forward(self, rows, weight, groups):
        self._calls["forward", weight[0].data_ptr()] += 1
        return self._gemms.forward(rows, weight, groups)

    def input_gradient(self, rows, weight, groups, add_to=None):
        self._calls["input gradient", weight[0].data_ptr()] += 1
        return self._gemms.input_gradient(rows, weight, groups, add_to)

    def weight_gradient(self, gradient, fresh, dy, x, groups):
        self._calls["weight gradient", gradient.data_ptr()] += 1
        self._gemms.weight_gradient(gradient, fresh, dy, x, groups)


def _counted(numerics, calls):
    class Counted(Numerics):
        linear = property(lambda _: Counting(numerics.linear, calls))
        mtp_projection = property(lambda _: Counting(numerics.mtp_projection, calls))

    return Counted(numerics.compute, numerics.fp8, numerics.recompute)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v", "dualpipe_v"])  # on one rank: F and B; I and W; overlapped pairs
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_every_gemm_of_a_layer_runs_once_per_microbatch(precision, schedule):
    config = configuration(precision, model={"num_hidden_layers": 2}, schedule=schedule)
    calls, microbatches = Counter(), 8
    numerics = numerics_of("fp8", config)  # resolves any precision
    running = engine(config, _counted(numerics, calls))
    running.step(rows(config, count=microbatches), MTP, ALPHA, "step 1")
    layers = {
        name: module
        for name, module in running.model.named_modules()
        if isinstance(getattr(module, "gemms", None), Counting)
    }
    assert len(layers) == 3 * 5 + 3 + 2 * (3 + 3) + 1  # attention; dense; shared and routed experts; MTP projection
    kinds = {a.kind.value for _, a in running.schedule(microbatches).computations()}
    assert kinds == {"1f1b": {"F", "B"}, "zb_v": {"F", "I", "W"}, "dualpipe_v": {"F", "B", "I", "W"}}[schedule]
    for name, layer in layers.items():
        operand, gradient = layer.operand()[0].data_ptr(), layer.weight.grad.data_ptr()
        again = numerics.recompute.up_projections and name.endswith(("q_b_proj", "kv_b_proj"))
        assert calls.pop(("forward", operand)) == microbatches * (2 if again else 1), name
        assert calls.pop(("input gradient", operand)) == microbatches, name
        assert calls.pop(("weight gradient", gradient)) == microbatches, name
    assert not calls, "a GEMM of no layer"


def test_a_microbatch_of_another_shape_is_refused_by_its_action():
    config = configuration(microbatch=2)
    running = engine(config, Numerics("fp32"))
    with pytest.raises(ShapeError, match=r"^0F3 of step 9: .*\[1, 16, 64\] where the step has \[2, 16, 64\]$"):
        running.step(rows(config, count=7), MTP, ALPHA, "step 9")


def test_rows_of_another_length_than_the_phase_has_are_refused_by_the_first_action():
    config = configuration(microbatch=2)
    running = engine(config, Numerics("fp32"))
    with pytest.raises(ShapeError, match=r"^0F0 of step 9: .*\[2, 15, 64\] where the step has \[2, 16, 64\]$"):
        running.step(rows(config)[:, :-1], MTP, ALPHA, "step 9")


def test_a_schedule_that_leaves_work_undone_is_our_fault():
    config = configuration()
    running = engine(config, Numerics("fp32"))
    schedule = forward_only(generate("1f1b", 1, 1), 1)
    given = Microbatch(rows(config, count=1), Weights(1, MTP, ALPHA, train=True))
    transfers = Transfers(running.groups, running.mesh, given.shape(config.model), torch.float32, CPU)
    executor = Executor(0, running.stages, Surroundings(InlineChannel(), running.store), transfers, Unwatched())
    with pytest.raises(AssertionError, match="work undone"):
        executor.run(Plan(schedule, lambda _: given, True, None))
