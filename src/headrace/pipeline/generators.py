"""Schedules: which microbatch runs forward or backward on which rank, in what order.

Every function returns computations only (F, B, I, W and overlapped pairs); `communication.with_communication` adds the
transfers and the reductions. Below, F, B, W and F&B are the times of one stage's forward, whole backward, weight
gradient and overlapped pair; where there are 2 PP stages, each is half as long.

    name              stages  placement                      idle time of a rank        live activations, in stages
    1f1b              PP      stage s on rank s              (PP-1)(F+B)                PP
    interleaved_1f1b  v PP    stage s on rank s mod PP       (PP-1)(F+B)                (v-1) R + 2 (PP-1) + 1
    zb1p              PP      stage s on rank s              (PP-1)(F+B-2W)             PP
    zb_v              2 PP    V: rank r holds r, 2PP-1-r     (PP-1) F if F = B-W = W    2 PP
    dualpipe          PP      rank r holds r and PP-1-r      (PP/2-1)(F&B+B-3W)         PP + 1
    dualpipe_v        2 PP    V                              (PP-1)(F&B+B-3W)           2 PP + 1

The last two idle times are exact for B = 2F, W = F only. R is a round of interleaved_1f1b: PP microbatches, or somewhat
more (`interleaved_one_f_one_b`). The last column is `live_bound`: the rank that holds most holds as many where there
are at least 2 PP microbatches, and fewer where these do not fill the pipeline.

Where the backward is split, I (gradient of the input) comes first, for another rank waits for it, and W (gradient of
the weights) fills what would be idle time (Zero Bubble, arXiv 2401.10241; ZB-V: arXiv 2405.15362). DualPipe
(DeepSeek-V3 report, arXiv 2412.19437, section 3.2.1) feeds microbatches from both ends, and pairs forwards of one
direction with backwards of the other, so that each hides the other's communication; DualPipeV folds it, so that no
stage needs a copy.
"""

from collections.abc import Callable

from headrace.errors import UserError
from headrace.pipeline.rank_list import RankList
from headrace.pipeline.schedule import Action, Kind, Schedule

_DUALPIPE_NEEDS = "needs an even number of ranks and an even number of microbatches, at least twice the ranks"


def generate(name: str, ranks: int, microbatches: int) -> Schedule:
    """The schedule of `parallel.schedule=name`; raises `UserError` where it does not exist for these numbers."""
    if name not in _SCHEDULES:
        raise UserError(f"schedule {name!r} is none of {', '.join(_SCHEDULES)}")
    if ranks < 1 or microbatches < 1:
        raise UserError(f"a schedule needs at least 1 rank and 1 microbatch, not {ranks} and {microbatches}")
    return _SCHEDULES[name][0](ranks, microbatches)


def live_bound(name: str, ranks: int, microbatches: int) -> int:
    """Activations, of a stage and a microbatch each, that any rank of this schedule may hold at once; for `validate`.

    The numbers are those that `generate` accepts.
    """
    return _SCHEDULES[name][1](ranks, microbatches)


def pick(ranks: int, microbatches: int) -> tuple[str, str]:
    """What `parallel.schedule=auto` means: (name, the reason in one sentence).

    Where DualPipe does not exist, it is ZB1P: that takes any numbers and, as DualPipe does, cuts the model into as many
    stages as there are ranks, so a choice of `parallel.layers` fits both. (DualPipeV and ZB-V want twice as many.)
    """
    if ranks == 1:
        return "1f1b", "one rank has nobody to wait for."
    if _dualpipe_exists(ranks, microbatches):
        return "dualpipe", "it hides the communication of a forward under a backward, and the other way round."
    return "zb1p", (
        f"dualpipe {_DUALPIPE_NEEDS}, not {ranks} and {microbatches}, and zb1p, which takes any numbers, "
        "idles least of the others that cut the model into one stage per rank."
    )


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """After a warm-up, one forward and one backward in turn (PipeDream-Flush, arXiv 2006.09503)."""
    return _interleaved("1f1b", ranks, microbatches, stages_per_rank=1, round_size=microbatches)


def interleaved_one_f_one_b(ranks: int, microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """1F1B where a rank holds several stages and a round of microbatches passes one after the other (arXiv 2104.04473).

    A round has PP microbatches, or somewhat more where PP does not divide N; all rounds are equal.
    """
    rounds = _rounds(ranks, microbatches)
    if microbatches % rounds:
        below = microbatches - microbatches % ranks
        raise UserError(
            f"interleaved_1f1b on {ranks} ranks cannot cut {microbatches} microbatches into {rounds} equal rounds; "
            f"{below} and {below + ranks} are possible"
        )
    return _interleaved("interleaved_1f1b", ranks, microbatches, stages_per_rank, microbatches // rounds)


def _rounds(ranks: int, microbatches: int) -> int:
    return max(1, microbatches // ranks)


def zb1p(ranks: int, microbatches: int) -> Schedule:
    """1F1B with a split backward: rank r keeps r weight gradients back, and runs them when the pipeline drains."""

    def one(rank: int) -> tuple[Action, ...]:
        out = RankList((rank, range(microbatches)))
        out.forwards(0, min(ranks - 1 - rank, microbatches))
        for done in range(microbatches):
            out.forward(0)
            out.input_gradient(0)
            if done >= rank:
                out.weight_gradient()
        return out.finish()

    return Schedule("zb1p", tuple(map(one, range(ranks))))


def zb_v(ranks: int, microbatches: int) -> Schedule:
    """Two stages per rank in a V, so that a microbatch ends on the rank where it began (arXiv 2405.15362).

    With too few microbatches to fill the V, it is the schedule of 2PP-1 of them without those that do not exist.
    """
    filling = range(max(microbatches, 2 * ranks - 1))

    def one(rank: int) -> tuple[Action, ...]:
        out = RankList((rank, filling), (2 * ranks - 1 - rank, filling))
        out.forwards(0, 2 * (ranks - rank) - 1)
        for _ in range(rank):
            out.forward(1)
            out.forward(0)
        for _ in range(ranks - rank):
            out.forward(1)
            out.split_backward(1)
        while out.forwards_left(1):
            out.forward(0)
            out.split_backward(0)
            out.forward(1)
            out.split_backward(1)
        for _ in range(rank):
            out.input_gradient(0)
            out.input_gradient(1)
        for _ in range(ranks - rank):
            out.input_gradient(0)
            out.weight_gradient(0)
        while out.weight_gradient(1):
            pass
        return tuple(action for action in out.finish() if (action.microbatch or 0) < microbatches)

    return Schedule("zb_v", tuple(map(one, range(ranks))))


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Bidirectional: microbatches 0..N/2-1 enter at rank 0, the others at rank PP-1, stage s on rank PP-1-s."""
    if not _dualpipe_exists(ranks, microbatches):
        raise UserError(f"dualpipe {_DUALPIPE_NEEDS}, not {ranks} and {microbatches}; zb1p takes any numbers")
    down, up = range(microbatches // 2), range(microbatches // 2, microbatches)

    def one(rank: int) -> tuple[Action, ...]:
        chunks = (rank, down), (ranks - 1 - rank, up)
        near = min(rank, ranks - 1 - rank)
        return _eight_steps(*(chunks if rank == near else chunks[::-1]), near, ranks // 2, len(down))

    return Schedule("dualpipe", tuple(map(one, range(ranks))))


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
    """DualPipe cut in half and folded: two stages per rank in a V, every microbatch begins and ends on rank 0."""
    if microbatches < 2 * ranks:
        raise UserError(
            f"dualpipe_v on {ranks} ranks needs at least {2 * ranks} microbatches, not {microbatches}; "
            "zb_v and zb1p take any number"
        )
    every = range(microbatches)
    return Schedule(
        "dualpipe_v",
        tuple(
            _eight_steps((rank, every), (2 * ranks - 1 - rank, every), rank, ranks, microbatches)
            for rank in range(ranks)
        ),
    )


def forward_only(schedule: Schedule, microbatches: int) -> Schedule:
    """Only forwards, of any number of microbatches, on the same placement: for validation losses.

    Where the schedule has several chains (DualPipe: two), microbatches take them in turn. The k-th microbatch of a
    chain passes stage s at time k + s; sorted by that time, no rank waits for one that waits for it.
    """
    stages = range(schedule.stages)
    chains = list(dict.fromkeys(tuple(schedule.rank_of(s, m) for s in stages) for m in range(schedule.microbatches)))
    passes = sorted(
        (microbatch // len(chains) + stage, microbatch, stage) for microbatch in range(microbatches) for stage in stages
    )
    actions: list[list[Action]] = [[] for _ in range(schedule.ranks)]
    for _, microbatch, stage in passes:
        actions[chains[microbatch % len(chains)][stage]].append(Action(stage, Kind.F, microbatch))
    return Schedule(f"{schedule.name}, forward only", tuple(map(tuple, actions)))


def _eight_steps(
    chunk0: tuple[int, range], chunk1: tuple[int, range], near: int, half: int, count: int
) -> tuple[Action, ...]:
    """One rank of DualPipe (half = PP/2 ranks of each direction) or DualPipeV (half = PP).

    `near` is the rank's distance from the end where chunk 0 enters, so the middle has near = half - 1; each chunk has
    `count` microbatches. Chunk 1 is on its way back when it comes by here: it passes this rank later than chunk 0.
    """
    out = RankList(chunk0, chunk1)
    far = half - 1 - near  # distance from the middle
    out.forwards(0, 2 * far)  # step 1
    for _ in range(near + 1):  # step 2
        out.forward(0)
        out.forward(1)
    for _ in range(far):  # step 3: as the pipeline fills, a split backward makes the next rank wait less
        out.split_backward(1)
        out.forward(1)
    for number in range(count - 2 * half + near + 1):  # step 4, the bulk
        if number == 0 and far == 0:
            out.forward(0)  # not overlapped: in the middle, the rank across waits for this very output
            out.backward(1)
        else:
            out.pair(0, 1)
        out.pair(1, 0)
    for _ in range(far):  # step 5
        out.backward(1)
        out.pair(1, 0)
    for number in range(2 * (near + 1)):  # step 6: of the last backwards, the second half is split
        (out.backward if number <= near else out.input_gradient)(1 - number % 2)
    for _ in range(far):  # step 7
        out.weight_gradient()
        out.input_gradient(0)
    return out.finish()  # step 8: what is still deferred


def _dualpipe_exists(ranks: int, microbatches: int) -> bool:
    return ranks % 2 == 0 and microbatches % 2 == 0 and microbatches >= 2 * ranks


def _interleaved(name: str, ranks: int, microbatches: int, stages_per_rank: int, round_size: int) -> Schedule:
    """1F1B over `stages_per_rank` stages; a pass is one microbatch through one stage, in rounds."""
    total = microbatches * stages_per_rank

    def passes(rank: int, backward: bool) -> list[tuple[int, int]]:
        order = range(stages_per_rank)[:: -1 if backward else 1]
        return [
            (rank + chunk * ranks, first + microbatch)
            for first in range(0, microbatches, round_size)
            for chunk in order
            for microbatch in range(round_size)
        ]

    def one(rank: int) -> tuple[Action, ...]:
        forwards = [Action(stage, Kind.F, microbatch) for stage, microbatch in passes(rank, backward=False)]
        backwards = [Action(stage, Kind.B, microbatch) for stage, microbatch in passes(rank, backward=True)]
        # Between a forward and the backward of the same stage lie the ranks behind, there and back; with one stage per
        # rank half of that is enough, as its next forward may wait until a backward is due.
        ahead = (stages_per_rank - 1) * round_size + (2 if stages_per_rank > 1 else 1) * (ranks - 1 - rank)
        warm = min(ahead, total)
        turns = [action for pair in zip(forwards[warm:], backwards, strict=False) for action in pair]
        return tuple(forwards[:warm] + turns + backwards[total - warm :])

    return Schedule(name, tuple(map(one, range(ranks))))


_SCHEDULES: dict[str, tuple[Callable[[int, int], Schedule], Callable[[int, int], int]]] = {
    "1f1b": (one_f_one_b, lambda ranks, _: ranks),
    "interleaved_1f1b": (
        interleaved_one_f_one_b,
        lambda ranks, microbatches: microbatches // _rounds(ranks, microbatches) + 2 * (ranks - 1) + 1,
    ),
    "zb1p": (zb1p, lambda ranks, _: ranks),
    "zb_v": (zb_v, lambda ranks, _: 2 * ranks),
    "dualpipe": (dualpipe, lambda ranks, _: ranks + 1),
    "dualpipe_v": (dualpipe_v, lambda ranks, _: 2 * ranks + 1),
}
"""By name the generator and the bound on live activations, both from PP and N."""
