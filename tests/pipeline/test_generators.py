"""Schedules against torch's own, the DeepSeek-V3 report's steps and counts, and the published peaks of activations."""

from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from headrace.errors import UserError
from headrace.pipeline.generators import forward_only, generate, interleaved_one_f_one_b, live_bound, pick
from headrace.pipeline.schedule import Kind, Schedule
from headrace.pipeline.validate import validate

NAMES = ("1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v")
PEERS = {
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "zb_v": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipe_v": torch_schedules.ScheduleDualPipeV,
}


def printed(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, row)) for row in schedule.actions]


def torch_order(peer: type, ranks: int, microbatches: int, stages_per_rank: int = 2) -> list[str] | None:
    """What torch would run, from stand-ins for its stages; None where it refuses."""
    stage = SimpleNamespace(num_stages=ranks * stages_per_rank, group_size=ranks, group_rank=0, submod=None)
    try:
        order = peer([stage] * stages_per_rank, microbatches).pipeline_order
    except ValueError:
        return None
    return [" ".join(str(action) for action in order[rank] if action is not None) for rank in range(ranks)]


@pytest.mark.parametrize("name", PEERS)
def test_the_order_is_that_of_torch_and_what_torch_refuses_is_refused(name: str) -> None:
    compared = 0
    for ranks, microbatches in [*product(range(1, 6), range(1, 17)), (8, 40)]:
        theirs = torch_order(PEERS[name], ranks, microbatches)
        if theirs is None:
            with pytest.raises(UserError):
                generate(name, ranks, microbatches)
        else:
            assert printed(generate(name, ranks, microbatches)) == theirs, (ranks, microbatches)
            compared += 1
    assert compared > 40


def test_more_interleaved_stages_are_ordered_as_in_torch() -> None:
    peer = torch_schedules.ScheduleInterleaved1F1B
    for stages_per_rank in (3, 4):
        assert printed(interleaved_one_f_one_b(4, 8, stages_per_rank)) == torch_order(peer, 4, 8, stages_per_rank)


def test_one_f_one_b_is_that_of_torch() -> None:
    """On the last rank, what torch's prints (and does not run) numbers forwards from 1, so there only kinds compare."""
    for ranks, microbatches in [(2, 4), (4, 8), (4, 9), (5, 5)]:
        stand_in = SimpleNamespace(pp_group_size=ranks, _num_stages=ranks, _n_microbatches=microbatches)
        order = torch_schedules.Schedule1F1B._get_pipeline_order(stand_in)
        theirs = [[str(a) for a in order[rank] if a is not None][:-1] for rank in range(ranks)]  # but REDUCE_GRAD
        ours = [[str(a) for a in row] for row in generate("1f1b", ranks, microbatches).actions]
        assert ours[:-1] == theirs[:-1]
        assert [text.strip("0123456789") for text in ours[-1]] == [text.strip("0123456789") for text in theirs[-1]]


def test_the_eight_steps_of_dualpipe_written_out() -> None:
    edge, middle, *_ = printed(generate("dualpipe", 4, 8))
    assert edge == (
        "0F0 0F1 0F2 3F4 3I4 3W4 3F5 (0F3;3B5)OVERLAP_F_B (3F6;0B0)OVERLAP_F_B "
        "3B6 (3F7;0B1)OVERLAP_F_B 3B7 0I2 0W2 0I3 0W3"
    )
    assert middle == (
        "1F0 2F4 1F1 2F5 1F2 2B4 (2F6;1B0)OVERLAP_F_B (1F3;2B5)OVERLAP_F_B (2F7;1B1)OVERLAP_F_B 2B6 1B2 2I7 1I3 2W7 1W3"
    )


def test_the_counts_of_dualpipe_at_the_size_of_the_report() -> None:
    for rank, row in enumerate(generate("dualpipe", 16, 120).actions):
        near = min(rank, 15 - rank)
        counts = Counter(action.kind for action in row)
        if near == 7:
            expected = {Kind.F: 17, Kind.OVERLAP_F_B: 103, Kind.B: 9, Kind.I: 8, Kind.W: 8}
        else:
            split = 15 - near
            expected = {Kind.F: 23 - near, Kind.OVERLAP_F_B: 97 + near, Kind.B: 8, Kind.I: split, Kind.W: split}
        assert counts == expected


def test_dualpipe_looks_the_same_from_both_ends() -> None:
    schedule = generate("dualpipe", 6, 14)
    for row, mirrored in zip(schedule.actions, reversed(schedule.actions), strict=True):
        one = [(p.stage, p.kind, (p.microbatch + 7) % 14) for action in row for p in action.computations]
        assert one == [(p.stage, p.kind, p.microbatch) for action in mirrored for p in action.computations]


def test_weight_gradients_run_oldest_first() -> None:
    for name, schedule in ((name, generate(name, 4, 12)) for name in ("zb1p", "dualpipe", "dualpipe_v")):
        for row in schedule.actions:
            halves = [[(p.stage, p.microbatch) for p in row if p.kind is kind] for kind in (Kind.I, Kind.W)]
            assert halves[0] == halves[1], name


def peaks(schedule: Schedule) -> list[int]:
    """Live activations by rank, in stages: forwards begun, backwards (or input gradients) not yet ended."""
    result = []
    for row in schedule.actions:
        live = peak = 0
        for action in row:
            live += sum(part.kind is Kind.F for part in action.computations)
            peak = max(peak, live)
            live -= sum(part.kind in (Kind.B, Kind.I) for part in action.computations)
        result.append(peak)
    return result


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_the_peak_of_live_activations_is_the_published_one(ranks: int, microbatches: int) -> None:
    sizes = (ranks, microbatches)
    assert peaks(generate("1f1b", *sizes)) == list(range(ranks, 0, -1))
    assert max(peaks(generate("zb1p", *sizes))) == ranks
    assert peaks(generate("zb_v", *sizes)) == [2 * ranks] * ranks
    assert peaks(generate("dualpipe", *sizes)) == [ranks + 1] * ranks
    assert peaks(generate("dualpipe_v", *sizes)) == [2 * ranks + 1] * ranks


@pytest.mark.parametrize(
    ("ranks", "microbatches", "round_size"), [(2, 4, 2), (4, 8, 4), (4, 10, 5), (8, 20, 10), (8, 22, 11), (16, 119, 17)]
)
def test_the_peak_of_interleaved_stages_follows_their_round(ranks: int, microbatches: int, round_size: int) -> None:
    """A round of the stage before, and what lies between a forward and its backward, there and back (2104.04473)."""
    first, *others = peaks(generate("interleaved_1f1b", ranks, microbatches))
    assert first == round_size + 2 * (ranks - 1) + 1
    assert others == [first - 2 * rank for rank in range(1, ranks)]


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_bound_holds_where_few_microbatches_do_not_fill_the_pipeline(name: str) -> None:
    compared = 0
    for ranks, microbatches in product(range(1, 9), range(1, 28)):
        try:
            schedule = generate(name, ranks, microbatches)
        except UserError:
            continue
        bound = live_bound(name, ranks, microbatches)
        assert max(peaks(schedule)) <= bound
        assert max(peaks(schedule)) == bound or microbatches < 2 * ranks
        compared += 1
    assert compared > 30


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "possible"),
    [
        ("dualpipe", 3, 12, "even number of ranks"),
        ("dualpipe", 4, 9, "even number of microbatches"),
        ("dualpipe", 4, 6, "at least twice the ranks"),
        ("dualpipe_v", 4, 7, "at least 8 microbatches"),
        ("interleaved_1f1b", 4, 9, "8 and 12 are possible"),
        ("gpipe", 4, 8, "dualpipe_v"),
        ("1f1b", 4, 0, "at least 1"),
    ],
)
def test_impossible_numbers_are_refused_with_possible_ones(
    name: str, ranks: int, microbatches: int, possible: str
) -> None:
    with pytest.raises(UserError, match=possible) as refusal:
        generate(name, ranks, microbatches)
    assert "\n" not in str(refusal.value)


def test_the_pick_always_exists_and_says_why() -> None:
    assert pick(4, 8)[0] == pick(2, 4)[0] == pick(16, 120)[0] == "dualpipe"
    assert pick(1, 8)[0] == "1f1b"
    assert pick(4, 7)[0] == pick(4, 6)[0] == pick(3, 12)[0] == "zb1p"
    assert "even" in pick(4, 7)[1]
    for ranks, microbatches in product(range(1, 7), range(1, 14)):
        name, reason = pick(ranks, microbatches)
        validate(generate(name, ranks, microbatches))
        assert reason.endswith(".")
        assert "\n" not in reason


@pytest.mark.parametrize("name", NAMES)
def test_forward_only_keeps_the_placement_for_any_number_of_microbatches(name: str) -> None:
    schedule = generate(name, 4, 12)
    for microbatches in (1, 5, 30):
        forwards = forward_only(schedule, microbatches)
        validate(forwards)
        assert forwards.microbatches == microbatches
        assert {part.kind for _, part in forwards.computations()} == {Kind.F}
        for rank in range(4):
            assert set(forwards.stages_of(rank)) <= set(schedule.stages_of(rank))
    chains = {tuple(forwards.rank_of(stage, m) for stage in range(schedule.stages)) for m in range(0, 30, 2)}
    assert len(chains) == 1
    if name == "dualpipe":
        assert [forwards.rank_of(0, m) for m in range(4)] == [0, 3, 0, 3]
