"""Transfers and reductions: what is sent is what another rank needs, received one action ahead, never more."""

from collections import Counter
from collections.abc import Sequence

import pytest

from headrace.pipeline.communication import with_communication
from headrace.pipeline.generators import forward_only, generate
from headrace.pipeline.schedule import TRANSFERS, Action, Kind, Schedule
from headrace.pipeline.validate import validate

NAMES = ("1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v")


def test_dualpipe_on_two_ranks_written_out() -> None:
    first, second = with_communication(generate("dualpipe", 2, 4)).to_csv().splitlines()
    assert first.replace(",", " ") == (
        "1RECV_F2 0F0 0SEND_F0 1F2 0F1 0SEND_F1 1RECV_F3 0RECV_B0 1B2 1SEND_B2 (1F3;0B0)OVERLAP_F_B "
        "0RECV_B1 1B3 1SEND_B3 1REDUCE_GRAD 0I1 0W1 0REDUCE_GRAD"
    )
    assert second.replace(",", " ") == (
        "1RECV_F0 0F2 0SEND_F2 1F0 0F3 0SEND_F3 1RECV_F1 0RECV_B2 1B0 1SEND_B0 (1F1;0B2)OVERLAP_F_B "
        "0RECV_B3 1B1 1SEND_B1 1REDUCE_GRAD 0I3 0W3 0REDUCE_GRAD"
    )


def test_nothing_travels_where_two_neighbouring_stages_share_a_rank() -> None:
    rows = with_communication(generate("zb_v", 2, 4)).actions
    travelling = {str(action)[:-1] for row in rows for action in row if action.kind in TRANSFERS}
    assert travelling == {
        *("0SEND_F", "1RECV_F", "1SEND_B", "0RECV_B"),  # between rank 0's and rank 1's first stages
        *("2SEND_F", "3RECV_F", "3SEND_B", "2RECV_B"),  # on the way back; 1 to 2 stays on rank 1
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_computations_stay_as_they_were_and_everything_else_follows_from_them(name: str) -> None:
    bare = generate(name, 4, 12)
    full = with_communication(bare)
    boundaries = sum(
        bare.rank_of(stage, m) != bare.rank_of(stage + 1, m) for stage in range(bare.stages - 1) for m in range(12)
    )
    counts = Counter(action.kind for row in full.actions for action in row)
    assert all(counts[kind] == boundaries for kind in TRANSFERS)
    assert counts[Kind.REDUCE_GRAD] == sum(len(bare.stages_of(rank)) for rank in range(4))
    for rank, row in enumerate(full.actions):
        assert tuple(action for action in row if action.computations) == bare.actions[rank]
        check_places(row)


def check_places(row: tuple) -> None:
    """Receives before the computation that precedes their own, sends right behind theirs."""
    computations = [place for place, action in enumerate(row) if action.computations]
    place_of = {(p.stage, p.kind, p.microbatch): place for place in computations for p in row[place].computations}
    for place, action in enumerate(row):
        if action.kind not in TRANSFERS:
            continue
        kinds = (Kind.F,) if action.kind in (Kind.SEND_F, Kind.RECV_F) else (Kind.B, Kind.I)
        own = computations.index(
            next(place_of[key] for k in kinds if (key := (action.stage, k, action.microbatch)) in place_of)
        )
        if action.kind in (Kind.RECV_F, Kind.RECV_B):
            expected = max(own - 1, 0)
            after = sum(at < place for at in computations)
            assert after == expected, f"{action} at {place}"
        else:
            assert sum(at < place for at in computations) == own + 1, f"{action} at {place}"


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 20)])
def test_mirror_ranks_reduce_in_the_same_order_and_after_the_last_gradient(ranks: int, microbatches: int) -> None:
    schedule = with_communication(generate("dualpipe", ranks, microbatches))
    for rank, row in enumerate(schedule.actions):
        order = [action.stage for action in row if action.kind is Kind.REDUCE_GRAD]
        assert order == sorted((rank, ranks - 1 - rank), reverse=True)
        reduced = set()
        for action in row:
            if action.kind is Kind.REDUCE_GRAD:
                reduced.add(action.stage)
            assert not any(part.stage in reduced for part in action.computations)


def last_gradients(row: Sequence[Action]) -> dict[int, int]:
    """By stage the place of its last B or W."""
    return {
        part.stage: place
        for place, action in enumerate(row)
        for part in action.computations
        if part.kind in (Kind.B, Kind.W)
    }


def begun_after(row: Sequence[Action]) -> dict[int, int]:
    """By stage the place of the computation that its reduction follows, with nothing but that one's sends between."""
    found: dict[int, int] = {}
    for place, action in enumerate(row):
        if action.computations:
            latest = place
        elif action.kind is Kind.REDUCE_GRAD:
            assert all(a.kind in (Kind.SEND_F, Kind.SEND_B, Kind.REDUCE_GRAD) for a in row[latest + 1 : place])
            found[action.stage] = latest
    return found


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (2, 12), (4, 8), (4, 12), (8, 20), (16, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_a_reduction_stands_right_behind_the_last_weight_gradient(name: str, ranks: int, microbatches: int) -> None:
    """In DualPipe too: on both ranks of a mirror pair the higher stage, which is reduced first, ends first."""
    schedule = with_communication(generate(name, ranks, microbatches))
    validate(schedule)
    for row in schedule.actions:
        assert begun_after(row) == last_gradients(row)
        if name == "dualpipe":
            (_, lower), (_, higher) = sorted(last_gradients(row).items())
            assert higher < lower


def test_only_the_order_of_mirror_ranks_holds_a_reduction_back() -> None:
    """Rank 0 ends stage 1 first and rank 1 stage 0: the higher one leads on both, so rank 1's stage 0 waits."""
    bare = Schedule.from_csv("0F0,1F1,0F2,1B1,0B0,0B2\n0F1,1F0,1F2,1B0,0B1,1B2\n")
    schedule = with_communication(bare)
    validate(schedule)
    first, second = schedule.actions
    assert begun_after(first) == last_gradients(first)
    assert [action.stage for action in first if action.kind is Kind.REDUCE_GRAD] == [1, 0]
    assert [str(action) for action in second[-4:]] == ["1B2", "1SEND_B2", "1REDUCE_GRAD", "0REDUCE_GRAD"]


def test_a_stage_without_copies_is_reduced_at_once() -> None:
    row = with_communication(generate("interleaved_1f1b", 2, 4)).actions[0]
    texts = [str(action) for action in row if not action.kind.startswith(("SEND", "RECV"))]
    assert texts[texts.index("2B3") + 1] == "2REDUCE_GRAD"
    assert texts[-2:] == ["0B3", "0REDUCE_GRAD"]


def test_without_backwards_there_is_nothing_to_reduce() -> None:
    schedule = with_communication(forward_only(generate("dualpipe", 4, 8), 6))
    kinds = {action.kind for row in schedule.actions for action in row}
    assert kinds == {Kind.F, Kind.SEND_F, Kind.RECV_F}


def test_a_rank_without_actions_stays_empty() -> None:
    schedule = Schedule.from_csv("0F0,0B0\n\n")
    assert with_communication(schedule).to_csv() == "0F0,0B0,0REDUCE_GRAD\n\n"
