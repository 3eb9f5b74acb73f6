"""The validator: against mutations of correct schedules, and against a slow checker that shares nothing with it."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import UserError
from headrace.pipeline.communication import with_communication
from headrace.pipeline.generators import generate, live_bound
from headrace.pipeline.schedule import Action, Kind, Schedule
from headrace.pipeline.validate import validate

NAMES = ("1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v")
PEAKS = {  # live activations: so many rounds, times PP, plus
    "1f1b": (0, 1, 0), "interleaved_1f1b": (1, 2, -1), "zb1p": (0, 1, 0), "zb_v": (0, 2, 0), "dualpipe": (0, 1, 1),
    "dualpipe_v": (0, 2, 1),
}  # fmt: skip


@st.composite
def schedules(draw: st.DrawFn, most_ranks: int = 16, most_rounds: int = 6) -> Schedule:
    """Any schedule, compute-only or with communication, PP 2..16, N 2PP..6PP."""
    name = draw(st.sampled_from(NAMES))
    ranks = draw(st.integers(2, most_ranks))
    if name == "dualpipe":
        ranks -= ranks % 2
    microbatches = draw(st.integers(2 * ranks, most_rounds * ranks))
    if name == "dualpipe":
        microbatches -= microbatches % 2
    if name == "interleaved_1f1b":
        microbatches -= microbatches % (microbatches // ranks)  # equal rounds, of PP microbatches or more
    schedule = generate(name, ranks, microbatches)
    return with_communication(schedule) if draw(st.booleans()) else schedule


def accepts(schedule: Schedule, live_bound: int | None = None) -> bool:
    try:
        validate(schedule, live_bound)
    except UserError as refusal:
        assert "\n" not in str(refusal)
        assert "rank" in str(refusal)
        return False
    return True


def changed(schedule: Schedule, rank: int, row: list[Action]) -> Schedule:
    actions = list(schedule.actions)
    actions[rank] = tuple(row)
    return Schedule(schedule.name, tuple(actions))


def place(draw: st.DrawFn, schedule: Schedule) -> tuple[int, int]:
    rank = draw(st.integers(0, schedule.ranks - 1))
    return rank, draw(st.integers(0, len(schedule.actions[rank]) - 1))


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_every_generated_schedule_is_accepted_with_its_published_peak_and_no_less(schedule: Schedule) -> None:
    assert accepts(schedule)
    rounds, factor, extra = PEAKS[schedule.name]
    round_size = schedule.microbatches // (schedule.microbatches // schedule.ranks)
    peak = rounds * round_size + factor * schedule.ranks + extra
    assert live_bound(schedule.name, schedule.ranks, schedule.microbatches) == peak
    assert accepts(schedule, peak)
    assert not accepts(schedule, peak - 1)


@settings(max_examples=50, deadline=None)
@given(schedules(), st.data())
def test_no_action_can_be_missing_doubled_or_another(schedule: Schedule, data: st.DataObject) -> None:
    rank, at = place(data.draw, schedule)
    row = list(schedule.actions[rank])
    other_rank, other_at = place(data.draw, schedule)
    other = schedule.actions[other_rank][other_at]
    there = list(schedule.actions[other_rank])
    assert not accepts(changed(schedule, rank, row[:at] + row[at + 1 :]))
    assert not accepts(changed(schedule, other_rank, [*there[:other_at], row[at], *there[other_at:]]))
    assert other == row[at] or not accepts(changed(schedule, rank, [*row[:at], other, *row[at + 1 :]]))


@pytest.mark.parametrize("name", NAMES)
def test_every_single_deletion_duplication_and_substitution_of_a_small_schedule(name: str) -> None:
    schedule = with_communication(generate(name, 2, 4))
    every = {action for row in schedule.actions for action in row}
    for rank, row in enumerate(map(list, schedule.actions)):
        for at, action in enumerate(row):
            assert not accepts(changed(schedule, rank, row[:at] + row[at + 1 :]))
            assert not accepts(changed(schedule, rank, [*row[:at], action, *row[at:]]))
            for other in every - {action}:
                assert not accepts(changed(schedule, rank, [*row[:at], other, *row[at + 1 :]]))


def brute_force(schedule: Schedule, stages: int, microbatches: int) -> bool:
    """The same question over strings and queues: count everything, then let ranks take turns until nothing moves."""
    rows = [[[str(p) for p in a.parts or (a,)] for a in row] for row in schedule.actions]
    flat = [[text for step in row for text in step] for row in rows]
    lowered = any(word in text for row in flat for text in row for word in ("SEND", "RECV", "REDUCE"))
    home = {text: rank for rank, row in enumerate(flat) for text in row if "REDUCE" not in text}
    expected: list[list[str]] = [[] for _ in rows]
    source: dict[str, tuple[int, str]] = {}  # what a receive is to bring, and from which rank
    for m in range(microbatches):
        for s in range(stages):
            rank = home.get(f"{s}F{m}")
            if rank is None:
                return False
            expected[rank] += [f"{s}F{m}"] + ([f"{s}B{m}"] if f"{s}B{m}" in home else [f"{s}I{m}", f"{s}W{m}"])
            neighbour = home.get(f"{s + 1}F{m}", rank) if s + 1 < stages else rank
            if lowered and neighbour != rank:
                expected[rank] += [f"{s}SEND_F{m}", f"{s}RECV_B{m}"]
                expected[neighbour] += [f"{s + 1}RECV_F{m}", f"{s + 1}SEND_B{m}"]
                source[f"{s + 1}RECV_F{m}"] = rank, f"{s}SEND_F{m}"
                source[f"{s}RECV_B{m}"] = neighbour, f"{s + 1}SEND_B{m}"
    target = {send: home.get(receive, -1) for receive, (_, send) in source.items()}
    for rank, row in enumerate(flat):
        held = {text.split("F")[0] for text in expected[rank] if text.replace("F", "").isdigit()}
        if Counter(row) != Counter(expected[rank] + [f"{s}REDUCE_GRAD" for s in held if lowered]):
            return False
    for one in flat:
        for other in flat:
            common = [[t for t in row if "REDUCE" in t and t in one and t in other] for row in (one, other)]
            if common[0] != common[1]:
                return False

    queues: dict[tuple[int, int, str], list[str]] = defaultdict(list)
    turn_to_receive: dict[tuple[int, int, str], int] = defaultdict(int)
    number: dict[str, tuple[tuple[int, int, str], int, int]] = {}  # a receive: its queue, its turn, when it was posted
    done: set[str] = set()
    places, computed = [0] * len(rows), [0] * len(rows)

    def has_input(rank: int, text: str) -> bool | None:
        """None: it never will."""
        kind = next(letter for letter in text if letter.isalpha())
        stage, m = text.split(kind)
        if kind == "W":
            return f"{stage}I{m}" in done or None
        if kind != "F" and f"{stage}F{m}" not in done:
            return None
        receive = f"{stage}RECV_{'F' if kind == 'F' else 'B'}{m}"
        if receive in source:
            if receive not in number or computed[rank] - number[receive][2] > 1:
                return None
            queue, turn, _ = number[receive]
            if len(queues[queue]) <= turn:
                return False
            return queues[queue][turn] == source[receive][1] or None
        before = int(stage) + (-1 if kind == "F" else 1)
        if not 0 <= before < stages:
            return True
        return bool(done & ({f"{before}F{m}"} if kind == "F" else {f"{before}B{m}", f"{before}I{m}"}))

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            if places[rank] == len(row):
                continue
            step = row[places[rank]]
            if "RECV" in step[0]:
                queue = source[step[0]][0], rank, step[0].split("RECV_")[1][0]
                number[step[0]] = queue, turn_to_receive[queue], computed[rank]
                turn_to_receive[queue] += 1
            elif "SEND" in step[0]:
                made_by = step[0].replace("SEND_", "")
                if not {made_by, made_by.replace("B", "I")} & done:
                    return False
                queues[rank, target[step[0]], step[0].split("SEND_")[1][0]].append(step[0])
            elif "REDUCE" in step[0]:
                stage = step[0].split("REDUCE")[0]
                later = [text for left in row[places[rank] :] for text in left]
                if any(text.startswith((f"{stage}B", f"{stage}W")) for text in later):
                    return False
            else:
                ready = [has_input(rank, text) for text in step]
                if None in ready:
                    return False
                if not all(ready):
                    continue
                computed[rank] += 1
            done.update(step)
            places[rank] += 1
            moved = True
    return places == [len(row) for row in rows]


@pytest.mark.parametrize(("most_ranks", "most_rounds", "examples"), [(4, 2, 400), (16, 6, 120)])
def test_reordered_schedules_are_judged_as_a_brute_force_checker_judges_them(
    most_ranks: int, most_rounds: int, examples: int
) -> None:
    """Small schedules are quickly judged, and an exchange of neighbours breaks them more often."""
    verdicts: Counter[bool] = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(schedules(most_ranks, most_rounds), st.data())
    def check(schedule: Schedule, data: st.DataObject) -> None:
        stages, microbatches = schedule.stages, schedule.microbatches
        for _ in range(data.draw(st.integers(0, 4))):
            rank, at = place(data.draw, schedule)
            row = list(schedule.actions[rank])
            row[at : at + 2] = row[at : at + 2][::-1]
            schedule = changed(schedule, rank, row)
        verdict = accepts(schedule)
        verdicts[verdict] += 1
        assert verdict == brute_force(schedule, stages, microbatches), schedule.to_csv()

    check()
    assert min(verdicts[True], verdicts[False]) > examples / 8


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("", "computes nothing"),
        ("0F0,0B0\n1F0", "rank 1: 1F0 wants 1B0, or 1I0 and 1W0; there is neither"),
        ("0F0,0I0\n1F0,1B0", "rank 0: 0F0 wants 0B0, or 0I0 and 0W0; there is 0I0"),
        ("0F0,0B0\n1F0,1B0,1I0", "rank 1: 1F0 wants .* there is 1B0, 1I0"),
        ("0F0,0B0\n1B0", "rank 1: 1B0 has no 1F0"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0", "no rank runs 1F1"),
        ("0F0,0B0\n0F0,1F0,1B0", "rank 1: 0F0 is there already, on rank 0"),
        ("0F0,1B0\n1F0,0B0", "rank 1: 0B0 is not on rank 0, where 0F0 is"),
        ("0B0,0F0", "rank 0: 0B0 comes before 0F0"),
        ("0F0,0W0,0I0", "rank 0: 0W0 comes before 0I0"),
        ("0F0,(0F1;0B1)OVERLAP_F_B,0B0", r"rank 0: \(0F1;0B1\)OVERLAP_F_B overlaps a microbatch with itself"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0", "rank 0: 0B0 waits for 1B0 of rank 1, which never comes: deadlock"),
        ("0F0,0B0,0SEND_F0\n1RECV_F0,1F0,1B0", "rank 0: 0RECV_B0 is missing"),
        ("0F0,0SEND_F0,0B0,0SEND_B0,0RECV_B0\n1RECV_F0,1F0,1B0,1SEND_B0", "rank 0: 0SEND_B0 moves nothing"),
    ],
)
def test_a_broken_schedule_is_refused_with_rank_action_and_reason(rows: str, why: str) -> None:
    with pytest.raises(UserError, match=f"{why}"):
        validate(Schedule.from_csv(rows))


SOUND = (
    "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0F2,0SEND_F2,0B0,0RECV_B1,0RECV_B2,0B1,0B2,0REDUCE_GRAD\n"
    "1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1RECV_F2,1B1,1SEND_B1,1F2,1B2,1SEND_B2,1REDUCE_GRAD\n"
)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("1RECV_F1,1B0,", "1B0,1RECV_F1,", None),  # later is allowed
        ("0SEND_F1,0RECV_B0,0F2", "0RECV_B0,0F2,0SEND_F1", None),
        ("0SEND_F1,0RECV_B0,0F2,0SEND_F2", "0RECV_B0,0F2,0SEND_F2,0SEND_F1", "a channel keeps its order"),
        ("1RECV_F0,1F0,1RECV_F1", "1RECV_F1,1RECV_F0,1F0", "rank 1: 1RECV_F1 is due when rank 0 sends 0SEND_F0"),
        ("1RECV_F0,1F0", "1F0,1RECV_F0", "rank 1: 1F0 needs 1RECV_F0 before it"),
        ("0F0,0SEND_F0", "0SEND_F0,0F0", "rank 0: 0SEND_F0 comes before 0F0"),
        ("1B0,1SEND_B0", "1SEND_B0,1B0", "rank 1: 1SEND_B0 comes before 1B0"),
        ("0SEND_F1,0RECV_B0,0F2", "0RECV_B0,0SEND_F1,0F2", None),
        ("0F1,0SEND_F1,0RECV_B0", "0RECV_B0,0F1,0SEND_F1", "rank 0: 0RECV_B0 holds a buffer for more than one action"),
        ("0B2,0REDUCE_GRAD", "0REDUCE_GRAD,0B2", "rank 0: 0REDUCE_GRAD comes before the stage's last gradient"),
        ("0REDUCE_GRAD", "1REDUCE_GRAD", "rank 0: 1REDUCE_GRAD has no gradient on this rank"),
        (",0REDUCE_GRAD", "", "rank 0: 0REDUCE_GRAD is missing"),
    ],
)
def test_transfers_and_reductions_have_their_place(before: str, after: str, why: str | None) -> None:
    validate(Schedule.from_csv(SOUND), live_bound=3)
    assert before in SOUND
    schedule = Schedule.from_csv(SOUND.replace(before, after))
    if why is None:
        validate(schedule)
    else:
        with pytest.raises(UserError, match=why):
            validate(schedule)


def test_mirror_ranks_must_reduce_in_the_same_order() -> None:
    schedule = with_communication(generate("dualpipe", 2, 4))
    row = list(schedule.actions[1])
    early = row.index(Action(1, Kind.REDUCE_GRAD))
    with pytest.raises(UserError, match="rank 1: 0REDUCE_GRAD is where rank 0 has 1REDUCE_GRAD"):
        validate(changed(schedule, 1, [*row[:early], *row[early + 1 :], row[early]]))


def test_too_many_live_activations_are_refused() -> None:
    with pytest.raises(UserError, match="rank 0: 0F2 makes 3 live activations; at most 2 may be"):
        validate(Schedule.from_csv(SOUND), live_bound=2)
