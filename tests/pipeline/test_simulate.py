"""The simulator against published bubbles, figures worked out by hand, and the memory of DeepSeek-V3's layout."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.pipeline.communication import with_communication
from headrace.pipeline.generators import generate
from headrace.pipeline.schedule import Action, Kind, Schedule
from headrace.pipeline.simulate import Costs, Simulation, simulate

SIZES = [(2, 4), (4, 8), (8, 20), (16, 120)]
V3_HIDDEN_BYTES = 4096 * 7168 * 2


def times(simulation: Simulation, rank: int) -> dict[str, tuple[float, float]]:
    return {span.action: (span.start, span.end) for span in simulation.spans if span.rank == rank}


@pytest.mark.parametrize(("size", "makespan", "idle"), list(zip(SIZES, [12, 26, 66, 374], [0, 2, 6, 14], strict=True)))
def test_dualpipe_takes_and_idles_what_the_report_says(size: tuple[int, int], makespan: float, idle: float) -> None:
    ranks, microbatches = size
    result = simulate(generate("dualpipe", ranks, microbatches), Costs(1, 2, 1, 1, 3))
    assert result.makespan == makespan
    assert result.idle == (idle,) * ranks
    assert result.live_activations == (ranks + 1,) * ranks
    assert result.busy == (3 * microbatches,) * ranks


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
@pytest.mark.parametrize("pair", [Fraction(3), Fraction(5, 2)])
def test_dualpipes_formula_holds_on_the_worst_rank_while_b_is_2f_and_w_is_f(
    ranks: int, microbatches: int, pair: Fraction
) -> None:
    result = simulate(generate("dualpipe", ranks, microbatches), Costs(2, 4, 2, 2, 2 * pair))
    assert max(result.idle) == (ranks / 2 - 1) * (2 * pair + 4 - 3 * 2)


def test_dualpipes_formula_is_not_exact_elsewhere() -> None:
    idle = simulate(generate("dualpipe", 16, 120), Costs(1, 2.6, 1.8, 0.8, 3)).idle
    assert (round(min(idle), 6), round(max(idle), 6)) == (17.8, 21.4)  # formula: 22.4


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_dualpipe_v_idles_as_dualpipe_on_twice_the_ranks(ranks: int, microbatches: int) -> None:
    result = simulate(generate("dualpipe_v", ranks, microbatches), Costs(1, 2, 1, 1, 3))
    assert result.idle == ((ranks - 1) * (3 + 2 - 3),) * ranks
    assert max(result.live_activations) == 2 * ranks + 1


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
@pytest.mark.parametrize(("f", "b", "w"), [(1, 2, 1), (3, 7, 3), (2, 5, 2)])
def test_1f1b_and_zb1p_idle_what_their_formulas_say(ranks: int, microbatches: int, f: int, b: int, w: int) -> None:
    costs = Costs(f, b, b - w, w)
    plain, split = (simulate(generate(name, ranks, microbatches), costs) for name in ("1f1b", "zb1p"))
    assert plain.idle == ((ranks - 1) * (f + b),) * ranks
    assert split.idle == ((ranks - 1) * (f + b - 2 * w),) * ranks
    assert max(plain.live_activations) == max(split.live_activations) == ranks


def test_receive_buffers_of_v3s_layout_fit_in_1_1_gib() -> None:
    result = simulate(generate("dualpipe", 16, 120), Costs(activation_bytes=V3_HIDDEN_BYTES))
    assert max(result.receive_buffers) == 20
    assert max(result.receive_bytes) == 20 * 56 * 2**20 <= 1.1 * 2**30
    assert result.sent_bytes[0] == 120 * V3_HIDDEN_BYTES  # 60 forwards down, 60 gradients back
    assert result.sent_bytes[7] == 240 * V3_HIDDEN_BYTES


def test_16_ranks_and_480_microbatches_in_two_seconds() -> None:
    schedule = generate("dualpipe", 16, 480)
    began = time.process_time()
    result = simulate(schedule, Costs(transfer=0.01))
    assert time.process_time() - began < 2
    assert max(result.receive_buffers) == 20  # does not grow with the number of microbatches


def test_a_transfer_waits_for_its_sender_its_receiver_and_the_one_before_it() -> None:
    text = "0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F0,1F0,1RECV_F1,1F1\n"
    spans = times(simulate(Schedule.from_csv(text), Costs(forward=(1, 10), transfer=4)), 1)
    assert spans == {"1F0": (5, 15), "1F1": (19, 29)}  # posted at 15 only: sent at 2, still 4 to go
    early = "0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F0,1RECV_F1,1F0,1F1\n"
    assert times(simulate(Schedule.from_csv(early), Costs(forward=1, transfer=4)), 1) == {"1F0": (5, 6), "1F1": (9, 10)}


def test_a_receive_one_action_ahead_hides_the_transfer() -> None:
    costs = Costs(forward=2, transfer=1)
    ahead = simulate(Schedule.from_csv("0F0,0F1\n1F0,1F1\n"), costs)
    assert times(ahead, 1) == {"1F0": (3, 5), "1F1": (5, 7)}
    late = simulate(Schedule.from_csv("0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F0,1F0,1RECV_F1,1F1\n"), costs)
    assert times(late, 1) == {"1F0": (3, 5), "1F1": (6, 8)}


def test_schedules_that_bring_their_transfers_are_taken_as_they_are() -> None:
    schedule, costs = generate("dualpipe", 4, 8), Costs(transfer=0.1, activation_bytes=3)
    assert simulate(with_communication(schedule), costs) == simulate(schedule, costs)


def test_uneven_stages_take_their_own_times() -> None:
    spans = times(simulate(generate("1f1b", 2, 1), Costs(forward=(1, 5), backward=(2, 7))), 0)
    assert spans == {"0F0": (0, 1), "0B0": (13, 15)}


def test_all_to_all_shows_alone_and_hides_in_a_pair() -> None:
    text = "0F0,(0F1;0B0)OVERLAP_F_B,0I1,0W1\n"
    result = simulate(Schedule.from_csv(text), Costs(dispatch=0.5, combine=0.25, all_to_all_bytes=10))
    assert [(span.start, span.end) for span in result.spans] == [(0, 1.75), (1.75, 4.75), (4.75, 6.5), (6.5, 7.5)]
    assert result.all_to_all_bytes == (40,)
    slow = simulate(Schedule.from_csv(text), Costs(dispatch=2, combine=3))
    assert times(slow, 0)["(0F1;0B0)OVERLAP_F_B"] == (6, 16)  # 2 x (2 + 3) covers the computation


def test_a_known_share_of_attention_gives_what_the_order_of_overlap_gives() -> None:
    text = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n"

    def pair_and_backward(**costs: float) -> tuple[float, ...]:
        spans = times(simulate(Schedule.from_csv(text), Costs(5, 10, 5, 5, attention=0.4, **costs)), 0)
        return tuple(spans[name][1] - spans[name][0] for name in ("(0F1;0B0)OVERLAP_F_B", "0B1"))

    # A layer's attention takes 2, 2 + 2 backward, its experts 3, 3 + 3 backward.
    assert pair_and_backward() == (15, 10)
    assert pair_and_backward(dispatch=2, combine=2) == (15, 12)  # alone, dispatch' runs under W
    assert pair_and_backward(dispatch=3, combine=3) == (16, 13)  # combine' shows 1
    assert pair_and_backward(dispatch=4, combine=1) == (15, 12)  # dispatch' shows 1 alone
    assert pair_and_backward(dispatch=10, combine=0) == (
        26,
        17,
    )  # attention, dispatch, dispatch', attention': 2 + 10 + 10 + 4


def test_buffers_are_held_as_long_as_somebody_may_read_them() -> None:
    split = "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0RECV_B1,0I0,0I1,0W0,0W1\n" + (
        "1RECV_F0,1F0,1RECV_F1,1F1,1I0,1SEND_B0,1I1,1SEND_B1,1W0,1W1\n"
    )
    result = simulate(Schedule.from_csv(split), Costs())
    assert result.receive_buffers == (2, 2)
    assert result.live_activations == (2, 2)
    one_by_one = split.replace("0RECV_B1,0I0,0I1,0W0,0W1", "0I0,0W0,0RECV_B1,0I1,0W1")
    assert simulate(Schedule.from_csv(one_by_one), Costs()).receive_buffers == (1, 2)
    whole_too_early = split.replace("0RECV_B1,0I0,0I1,0W0,0W1", "0I0,0RECV_B1,0W0,0I1,0W1")
    assert simulate(Schedule.from_csv(whole_too_early), Costs()).receive_buffers == (2, 2)  # W0 may still read


def test_without_backwards_a_buffer_is_free_after_its_forward() -> None:
    text = "0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F0,1F0,1RECV_F1,1F1\n"
    assert simulate(Schedule.from_csv(text), Costs()).receive_buffers == (0, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0\n1RECV_F0,1F0\n", "rank 1 stops at its action 1, 1F0: 1RECV_F0 never ends"),
        ("0B0,0F0\n", "rank 0 stops at its action 0, 0B0: 0F0 never ends"),
        ("0SEND_F0,0F0\n1RECV_F0,1F0\n", "rank 0 stops at its action 0, 0SEND_F0: 0F0 never ends"),
    ],
)
def test_what_never_comes_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        simulate(Schedule.from_csv(text), Costs())


def test_costs_must_cover_every_stage() -> None:
    with pytest.raises(UserError, match="weight has 3 entries; the schedule has 2 stages"):
        simulate(generate("1f1b", 2, 4), Costs(weight=(1, 2, 3)))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    """Any schedule with PP 2..16 and N 2PP..6PP, and whole times that differ from stage to stage: sums are exact."""
    name = draw(st.sampled_from(["1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"]))
    ranks = draw(st.integers(2, 16))
    ranks -= ranks % 2 if name == "dualpipe" else 0
    microbatches = draw(st.integers(2 * ranks, 6 * ranks))
    parts = {"dualpipe": 2, "interleaved_1f1b": microbatches // ranks}.get(name, 1)  # directions, rounds
    microbatches -= microbatches % parts
    schedule = generate(name, ranks, microbatches)
    per_stage = st.lists(st.integers(1, 50), min_size=schedule.stages, max_size=schedule.stages)
    costs = Costs(*(draw(per_stage) for _ in range(4)), draw(st.none() | per_stage), transfer=draw(st.integers(0, 9)))
    return schedule, costs


def own_time(action: Action, costs: Costs) -> int:
    """What an action takes, without an all-to-all."""
    of = {Kind.F: costs.forward, Kind.B: costs.backward, Kind.I: costs.input, Kind.W: costs.weight}
    if action.parts and costs.overlapped is not None:
        return costs.overlapped[action.parts[0].stage]
    return sum(of[part.kind][part.stage] for part in action.computations)


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_whatever_stages_take_every_action_waits_for_what_it_needs(world: tuple[Schedule, Costs]) -> None:
    """No schedule stops, ranks are busy as long as their actions take, and a step takes as long as it must at least."""
    schedule, costs = world
    result = simulate(schedule, costs)
    spans = iter(result.spans)
    start, end, took = {}, {}, {}  # of F, B, I and W; those of a pair are the pair's
    for rank, actions in enumerate(schedule.actions):
        clock = 0
        for action in actions:
            span = next(spans)
            assert (span.rank, span.action, span.end - span.start) == (rank, str(action), own_time(action, costs))
            assert span.start >= clock
            clock = span.end
            for part in action.computations:
                key = "B" if part.kind is Kind.I else part.kind.value, part.stage, part.microbatch
                start[key], end[key], took[key] = span.start, span.end, span.end - span.start
        assert result.busy[rank] == sum(own_time(action, costs) for action in actions)
        assert result.idle[rank] == result.makespan - result.busy[rank]
    assert next(spans, None) is None
    assert result.makespan == max(end.values()) >= max(result.busy)

    def way(microbatch: int, stage: int) -> float:
        """What it takes between a stage and the next one, there or back."""
        ranks = {schedule.rank_of(stage, microbatch), schedule.rank_of(stage + 1, microbatch)}
        return costs.transfer if len(ranks) > 1 else 0

    for microbatch in range(schedule.microbatches):
        chain = 0  # through all stages and back, as if nothing else were to be done
        for stage in range(schedule.stages):
            chain += took["F", stage, microbatch]
            if stage:
                between = way(microbatch, stage - 1)
                chain += between
                assert start["F", stage, microbatch] >= end["F", stage - 1, microbatch] + between
        for stage in reversed(range(schedule.stages)):
            chain += took["B", stage, microbatch]
            assert start["B", stage, microbatch] >= end["F", stage, microbatch]
            if stage + 1 < schedule.stages:
                between = way(microbatch, stage)
                chain += between
                assert start["B", stage, microbatch] >= end["B", stage + 1, microbatch] + between
            deferred = took.get(("W", stage, microbatch), 0)
            if deferred:
                assert start["W", stage, microbatch] >= end["B", stage, microbatch]
            assert result.makespan >= chain + deferred
