"""Actions and CSV in the spelling of torch.distributed.pipelining, against torch's own parser and file."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import (
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
    _Action,
)

from headrace.errors import UserError
from headrace.pipeline.communication import with_communication
from headrace.pipeline.generators import dualpipe, zb_v
from headrace.pipeline.schedule import TRANSFERS, Action, Kind, Schedule, overlap
from headrace.pipeline.validate import validate

PLAIN = [kind for kind in Kind if kind not in (Kind.OVERLAP_F_B, Kind.REDUCE_GRAD)]
EVERY_KIND = [
    *(Action(12, kind, 305) for kind in PLAIN),
    Action(2, Kind.REDUCE_GRAD),
    overlap(Action(0, Kind.F, 3), Action(5, Kind.B, 1)),
]


@pytest.mark.parametrize("action", EVERY_KIND, ids=str)
def test_an_action_reads_as_it_prints_here_and_in_torch(action: Action) -> None:
    assert Action.parse(str(action)) == action
    assert Action.parse(f"  {action} ") == action
    assert str(_Action.from_str(str(action))) == str(action)


@pytest.mark.parametrize(
    "text",
    [
        *("", "F0", "2F", "2X0", "2f0", "-1F0", "٣F0", "9999999999F0", "0F1 0F2", "2REDUCE_GRAD1", "2OVERLAP_F_B1"),
        *("(0F1)OVERLAP_F_B", "(0B1;0F2)OVERLAP_F_B", "(0F1;0I2)OVERLAP_F_B"),
        "(0F1;(0F2;0B3)OVERLAP_F_B)OVERLAP_F_B",
    ],
)
def test_what_is_no_action_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        Action.parse(text)
    assert "\n" not in str(refusal.value)


def test_computations_of_an_action() -> None:
    forward, backward = Action(0, Kind.F, 3), Action(5, Kind.B, 1)
    assert overlap(forward, backward).computations == (forward, backward)
    assert forward.computations == (forward,)
    assert all(Action(1, kind, 0).computations == () for kind in TRANSFERS)
    assert Action(1, Kind.REDUCE_GRAD).computations == ()


@pytest.mark.parametrize("schedule", [dualpipe(4, 8), zb_v(3, 7)], ids=lambda schedule: schedule.name)
def test_csv_both_ways(schedule: Schedule) -> None:
    assert Schedule.from_csv(schedule.to_csv()).actions == schedule.actions
    assert schedule.to_csv().count("\n") == schedule.ranks


def test_a_file_that_torch_wrote(tmp_path) -> None:
    stage = SimpleNamespace(num_stages=8, group_size=4, group_rank=0, submod=None)
    theirs = ScheduleDualPipeV([stage, stage], 9)
    theirs._dump_csv(tmp_path / "theirs.csv", format="compute_only")
    ours = Schedule.from_csv((tmp_path / "theirs.csv").read_text(), "theirs")
    assert [[str(a) for a in row] for row in ours.actions] == [
        [str(a) for a in theirs.pipeline_order[rank] if a is not None] for rank in range(4)
    ]
    assert (ours.ranks, ours.stages, ours.microbatches) == (4, 8, 9)


@pytest.mark.parametrize("theirs", [ScheduleDualPipeV, ScheduleZBVZeroBubble, ScheduleInterleaved1F1B])
def test_a_file_that_torch_wrote_with_transfers_has_those_that_we_would_add(theirs, tmp_path) -> None:
    stage = SimpleNamespace(num_stages=8, group_size=4, group_rank=0, submod=None)
    schedule = theirs([stage, stage], 8)
    schedule._prepare_schedule_with_comms(schedule.pipeline_order)
    schedule._dump_csv(tmp_path / "theirs.csv", format="compute_comms")
    text = (tmp_path / "theirs.csv").read_text()
    assert "0UNSHARD" in text
    assert "0RESHARD" in text
    ours = Schedule.from_csv(text)
    said = {str(action) for row in ours.actions for action in row}
    assert said == {cell for cell in text.replace("\n", ",").split(",") if cell and "SHARD" not in cell}
    computations = Schedule("theirs", tuple(tuple(a for a in row if a.computations) for row in ours.actions))
    validate(computations)
    assert said == {str(action) for row in with_communication(computations).actions for action in row}


def test_a_bad_cell_is_named_with_its_line() -> None:
    with pytest.raises(UserError, match=r"line 2: '1G0' is no action"):
        Schedule.from_csv("0F0,0B0\n1F0,1G0\n")


def test_the_place_of_a_stage_depends_on_the_microbatch() -> None:
    schedule = dualpipe(4, 8)
    assert [schedule.rank_of(1, microbatch) for microbatch in (0, 3, 4, 7)] == [1, 1, 2, 2]
    assert schedule.stages_of(1) == (1, 2)
    assert schedule.holders(0) == (0, 3)
    assert zb_v(4, 8).holders(5) == (2,)
