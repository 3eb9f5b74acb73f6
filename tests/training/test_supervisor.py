"""Attempts: what ends them, what follows, what the ledger tells. On real ranks where that matters, else scripted."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.checkpoint.reader import checkpoint_folder
from headrace.config.recipe import BatchRampConfig, ExtensionConfig, RopeScaling
from headrace.config.schema import Config, PhaseLayoutConfig
from headrace.errors import UserError
from headrace.launch.blame import RankFailure, Verdict
from headrace.launch.deadline import StopRequested
from headrace.launch.supervisor import Ended
from headrace.training import ledger, on_rank, supervisor
from headrace.training.ledger import figures, read
from headrace.training.on_rank import Job, Stretch
from headrace.training.place import Place, Watchers
from headrace.training.policies import DivergenceError
from headrace.training.supervisor import Account, Faults, job_in_phase, train_supervised
from toy_run import LENGTH, Recorder, toy_config

pytestmark = pytest.mark.alone

PROGRAM = Path(__file__).with_name("supervised_run.py")
STEPS, INTERVAL = 12, 4
RECOVERY_SECONDS = 20.0


def job_in(folder: Path, world: int = 2, config: Config | None = None) -> Job:
    config = config or toy_config(STEPS)
    config = replace(config, parallel=replace(config.parallel, data=world))
    place = Place(folder / "checkpoints", "0123456789ab", 1.0, None, phase="unset")
    return Job(config, folder / "tokens", folder / "artifact", place)


def watching(recorder: Recorder) -> Watchers:
    return Watchers(recorder, logging.getLogger("headrace.test"), recorder, recorder)


def events(folder: Path, *names: str) -> list[dict[str, Any]]:
    return [entry for entry in read(folder / ledger.NAME) if entry["event"] in names]


def ports() -> set[int]:
    return {one.laddr.port for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN}


# Real ranks


@dataclass
class Run:
    """Toy ranks below the supervisor."""

    folder: Path
    hang_seconds: float = 20.0
    recorder: Recorder = field(default_factory=Recorder)

    def train(self, *faults: tuple[int, int, str, bool]) -> dict[str, Any]:
        keys = ("step", "rank", "how", "once")
        path = self.folder / "faults.json"
        path.write_text(json.dumps([dict(zip(keys, fault, strict=True)) for fault in faults]))
        job = job_in(self.folder)
        config = replace(job.config, launch=replace(job.config.launch, hang_seconds=self.hang_seconds))
        before = ports()
        try:
            return train_supervised(
                replace(job, config=config), self.folder, watching(self.recorder), [str(PROGRAM), str(path)]
            )
        finally:
            assert psutil.Process().children(recursive=True) == []
            assert ports() <= before


def test_killed_hung_and_failed_ranks_cost_an_attempt_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, hang_seconds=3)
    faults = [(6, 1, "kill", True), (7, 0, "raise", True), (10, 1, "stop", True)]
    assert run.train(*faults) == {"steps": STEPS}
    failures = events(tmp_path, "failure")
    assert [(f["step"], f["rank"], f["cause"]) for f in failures] == [
        (5, 1, "killed"),
        (6, 0, "failed"),
        (9, 1, "lost"),
    ]
    assert failures[0]["what"] == "was killed by SIGKILL during 1F3 of step 6"
    assert "; going on from the newest good checkpoint" in caplog.text
    assert "rank 1 was killed by SIGKILL during 1F3 of step 6" in caplog.text
    logs = [Path(path) for path in failures[2]["stacks"]]
    assert [log.name for log in logs] == ["rank-0.log", "rank-1.log"]
    assert "barrier" in logs[0].read_text()  # the stack of the one that waited
    restarts = events(tmp_path, "restart")
    assert [entry["step"] for entry in restarts] == [5, 6, 9]
    assert restarts[0]["detect"] < 3 and restarts[2]["detect"] > 2
    assert all(sum(entry[part] for part in ledger.PARTS) < RECOVERY_SECONDS for entry in restarts[:2])
    found = figures(read(tmp_path / ledger.NAME))
    assert (found["attempts"], found["restarts"]) == (4, 3)
    # Attempts went from 0 to 5, 4 to 6, 4 to 9 and 8 to 12.
    assert found["tokens_computed"] == (5 + 2 + 5 + 4) * 4 * LENGTH
    assert found["goodput"] == pytest.approx(12 / 16)


def test_stopping_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(StopRequested, match=r"told to, saved at step \d+"):
        Run(tmp_path, recorder=Recorder(stop_after=5)).train((7, 0, "dawdle", True))
    saved = max(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert 5 <= saved < STEPS
    assert Run(tmp_path).train() == {"steps": STEPS}
    assert [entry["step"] for entry in events(tmp_path, "resumed")] == [0, saved]
    assert figures(read(tmp_path / ledger.NAME))["goodput"] == 1.0


# Scripts: every attempt calls the next function with `on_message`


Attempt = Callable[[Callable[[int, str, Any], None]], Ended]


class Script:
    """Takes the place of ranks; the jobs that they were started with are in `jobs`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *attempts: Attempt) -> None:
        self.folder, self.attempts, self.jobs = folder, list(attempts), list[Job]()
        monkeypatch.setattr(supervisor, "started", self._started)
        monkeypatch.setattr(supervisor, "supervise", self._supervise)
        monkeypatch.setattr(supervisor, "train", self._train)

    @contextmanager
    def _started(self, program: Sequence[str], *_: Any) -> Iterator[None]:
        self.jobs.append(Job.read(Path(program[-1])))
        yield

    def _supervise(self, ranks: None, on_message: Any, *_: Any) -> Ended:
        return self.attempts.pop(0)(on_message)

    def _train(self, job: Job, watchers: Watchers) -> Stretch:
        """In one process; what a rank would tell goes to the watchers."""
        self.jobs.append(job)
        said: list[Stretch] = []

        def on_message(rank: int, kind: str, payload: Any) -> None:
            if kind == on_rank.STRETCH:
                said.append(Stretch(**payload))
            elif kind == on_rank.PROGRESS:
                watchers.progress.update(*payload)
            else:
                watchers.ledger(*payload)

        self.attempts.pop(0)(on_message)
        return said[0]

    def takes(self, first: int, last: int, *, then: BaseException | None = None, after: str | None = None) -> Attempt:
        """Steps behind `first` up to `last`, a checkpoint at the end of a stretch, and how it ends."""

        def attempt(tell: Callable[[int, str, Any], None]) -> Ended:
            tell(0, on_rank.EVENT, ["resumed", {"step": first, "load": 0.0}])
            for step in range(first + 1, last + 1):
                tell(0, on_rank.PROGRESS, [step, STEPS, 0, {"loss": 1.0}])
            if then:
                raise then
            self.saved(last)
            tell(0, on_rank.STRETCH, {"step": last, "next_phase": after, "summary": None if after else {"steps": last}})
            return Ended(None)

        return attempt

    def saved(self, step: int) -> None:
        checkpoint_folder(self.folder / "checkpoints", step).mkdir(parents=True)


def failure(kind: str | None = None) -> RankFailure:
    what = "failed during 1F3: " + (kind or "KeyError: 3")
    return RankFailure(f"rank 1 {what}; all ranks were stopped", Verdict(1, what, kind=kind), 0.1)


def test_progress_between_two_failures_of_a_step_starts_the_count_anew() -> None:
    faults = Faults()
    assert [faults.add(step, saved=0) for step in (50, 50, 51, 50, 50, 51, 50, 45, 50)] == [None] * 9
    assert faults.add(50, saved=0) == "step 51 failed 3 times, so it would again"


def test_the_same_step_three_times_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(tmp_path, monkeypatch)
    script.attempts = [script.takes(0, 5, then=failure()) for _ in range(5)]
    with pytest.raises(RankFailure) as caught:
        train_supervised(job_in(tmp_path), tmp_path, watching(Recorder()))
    line = "step 6 failed 3 times, so it would again: rank 1 failed during 1F3: KeyError: 3; all ranks were stopped"
    assert str(caught.value) == line
    assert len(script.attempts) == 2
    assert events(tmp_path, "gave_up")[0]["why"] == f"RankFailure: {line}"


def test_attempts_that_never_save_come_to_an_end() -> None:
    faults = Faults()
    assert [faults.add(step, saved=40) for step in range(41, 50)] == [None] * 9
    assert faults.add(80, saved=70) is None
    assert [faults.add(step, saved=70) for step in range(81, 89)] == [None] * 8
    assert faults.add(90, saved=70) == ("10 attempts in a row saved nothing beyond step 70; lower checkpoint.interval")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (UserError("recipe.tokens=3: give it more"), UserError),
        (failure("DivergenceError"), DivergenceError),
        (StopRequested("SIGTERM, saved at step 3"), StopRequested),
    ],
)
def test_what_would_be_the_same_again_is_not_tried_again(
    raised: BaseException, expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, monkeypatch)
    script.attempts = [script.takes(0, 3, then=raised)]
    recorder = Recorder()
    with pytest.raises(expected):
        train_supervised(job_in(tmp_path), tmp_path, watching(recorder))
    assert recorder.closed and recorder.shown == [1, 2, 3]
    [end] = events(tmp_path, "stopped", "gave_up")
    assert end["event"] == ("stopped" if expected is StopRequested else "gave_up")


def test_asked_to_stop_while_a_rank_fails_there_is_no_further_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, monkeypatch)
    script.saved(2)
    script.attempts = [script.takes(2, 4, then=failure())]
    with pytest.raises(StopRequested, match=r"^told to, saved at step 2$"):
        train_supervised(job_in(tmp_path), tmp_path, watching(Recorder(stop_after=2)))
    assert len(events(tmp_path, "failure")) == 1


def test_a_recovery_is_reckoned_from_the_fault_to_where_training_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    book = ledger.Ledger(tmp_path / ledger.NAME, lambda: now[0])
    account = Account(book, supervisor.Schedule(toy_config(STEPS).recipe), watching(Recorder()))

    def update(step: int, at: float) -> None:
        now[0] = at
        account.update(step, STEPS, 0, {})

    account.begin(0, "main", 2)
    account.event("resumed", {"step": 0, "load": 0.0})
    for step in range(1, 7):
        update(step, 100.0 + step)
    account.event("save", {"step": 4, "stall": 0.5})
    now[0] = 108.0
    account.failed(RankFailure("rank 1 failed", Verdict(1, "failed", cause="hung"), 1.5), Path("ranks"))
    account.begin(4, "main", 2)
    now[0] = 113.0
    account.event("resumed", {"step": 4, "load": 2.0})
    update(5, 115.0)
    assert events(tmp_path, "restart") == []
    update(6, 117.0)
    [save], [hung], [restart] = (events(tmp_path, name) for name in ("save", "failure", "restart"))
    assert save["reached"] == 4.0 and save["tokens"] == 4 * 4 * LENGTH
    assert hung["stacks"] == ["ranks/rank-0.log", "ranks/rank-1.log"]
    assert {part: restart[part] for part in ledger.PARTS} == {"detect": 1.5, "restart": 3.0, "load": 2.0, "replay": 4.0}


def test_a_second_fault_on_the_way_back_belongs_to_the_same_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, monkeypatch)
    script.attempts = [
        script.takes(0, 6, then=failure()),
        script.takes(0, 3, then=failure()),
        script.takes(0, STEPS),
    ]
    assert train_supervised(job_in(tmp_path), tmp_path, watching(Recorder())) == {"steps": STEPS}
    assert [entry["step"] for entry in events(tmp_path, "restart")] == [6]
    assert len(events(tmp_path, "failure")) == 2


YARN = RopeScaling("yarn", 4.0, 32.0, 1.0, 1.0, 1.0, 16)


def in_phases(main_ranks: int, long_ranks: int) -> Config:
    """12 steps of main, then 3 at four times the length, on another number of ranks."""
    config = toy_config(STEPS)
    extension = ExtensionConfig("long", 3, 4 * LENGTH, 4, 1e-4, YARN)
    layout = PhaseLayoutConfig("long", None, None, long_ranks, None, None, None)
    parallel = replace(config.parallel, data=main_ranks, phases=(layout,))
    return replace(config, recipe=replace(config.recipe, extensions=(extension,)), parallel=parallel)


@pytest.mark.parametrize(("main_ranks", "long_ranks"), [(2, 4), (2, 1), (1, 2), (1, 1)])
def test_each_stretch_has_its_own_layout_and_model(
    main_ranks: int, long_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, monkeypatch)
    script.attempts = [script.takes(0, STEPS, after="long"), script.takes(STEPS, STEPS + 3)]
    config = in_phases(main_ranks, long_ranks)
    job = job_in(tmp_path, main_ranks, config)
    assert train_supervised(job, tmp_path, watching(Recorder())) == {"steps": STEPS + 3}
    assert [(job.place.phase, job.config.parallel.data) for job in script.jobs] == [
        ("main", main_ranks),
        ("long", long_ranks),
    ]
    assert [job.config.model.rope_scaling for job in script.jobs] == [config.model.rope_scaling, YARN]
    assert script.jobs[0].place.flops_per_token != script.jobs[1].place.flops_per_token
    assert [(e["phase"], e["ranks"]) for e in events(tmp_path, "attempt")] == [
        ("main", main_ranks),
        ("long", long_ranks),
    ]


def test_the_phase_is_that_of_the_newest_checkpoint_or_of_the_one_that_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, monkeypatch)
    script.saved(13)  # damaged, as the trainer finds out
    back = {"step": 8, "next_phase": "main", "summary": None}

    def falls_back(tell: Callable[[int, str, Any], None]) -> Ended:
        tell(0, on_rank.STRETCH, back)
        return Ended(None)

    script.attempts = [falls_back, script.takes(8, STEPS, after="long"), script.takes(STEPS, STEPS + 3)]
    train_supervised(job_in(tmp_path, config=in_phases(2, 2)), tmp_path, watching(Recorder()))
    assert [job.place.phase for job in script.jobs] == ["long", "main", "long"]


def test_a_run_whose_steps_are_all_done_is_taken_up_in_its_last_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tmp_path, monkeypatch)
    script.saved(STEPS + 3)

    def ends(tell: Callable[[int, str, Any], None]) -> Ended:
        tell(0, on_rank.STRETCH, {"step": STEPS + 3, "next_phase": None, "summary": {"steps": STEPS + 3}})
        return Ended(None)

    script.attempts = [ends]
    train_supervised(job_in(tmp_path, config=in_phases(2, 2)), tmp_path, watching(Recorder()))
    assert [job.place.phase for job in script.jobs] == ["long"]


def test_in_one_process_an_exception_is_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(tmp_path, monkeypatch)
    script.attempts = [script.takes(0, 5, then=RuntimeError("shapes disagree"))]
    with pytest.raises(RuntimeError, match="shapes disagree"):
        train_supervised(job_in(tmp_path, world=1), tmp_path, watching(Recorder()))
    script.attempts = [script.takes(0, STEPS)]
    assert train_supervised(job_in(tmp_path, world=1), tmp_path, watching(Recorder())) == {"steps": STEPS}
    assert [entry["sitting"] for entry in events(tmp_path, "attempt")] == [1, 2]
    assert events(tmp_path, "gave_up")[0]["why"] == "RuntimeError: shapes disagree"


def test_a_pulse_is_written_where_nothing_else_happens(tmp_path: Path) -> None:
    now = [0.0]
    book = ledger.Ledger(tmp_path / ledger.NAME, lambda: now[0])
    account = Account(book, supervisor.Schedule(toy_config(STEPS).recipe), watching(Recorder()))
    account.begin(0, "main", 1)
    for step in range(1, STEPS + 1):
        now[0] += 4.0
        account.update(step, STEPS, 0, {})
    assert [entry["step"] for entry in events(tmp_path, "step_done")] == [3, 6, 9, 12]


def test_the_job_of_a_phase_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    job = job_in(tmp_path, config=in_phases(2, 4))
    main = job_in_phase(job, "main")
    assert all(getattr(main.config, group) == getattr(job.config, group) for group in on_rank.GROUPS)
    assert (main.dataset, main.output, main.place.checkpoints) == (job.dataset, job.output, job.place.checkpoints)


@pytest.mark.parametrize(("microbatch", "until"), [(None, "main"), (1, "ramp")])
def test_phases_that_are_alike_are_trained_by_the_same_ranks(
    microbatch: int | None, until: str, tmp_path: Path
) -> None:
    """The ramp and what follows it, unless the layout says otherwise; never an extension with its own model."""
    config = in_phases(1, 1)
    layouts = (*config.parallel.phases, PhaseLayoutConfig("ramp", None, None, None, None, None, microbatch))
    ramp = BatchRampConfig(from_sequences=2, tokens="50%", shape="linear", multiple=2)
    changed = replace(
        config,
        recipe=replace(config.recipe, batch_ramp=ramp),
        parallel=replace(config.parallel, phases=layouts[1:] if microbatch is None else layouts),
    )
    job = job_in(tmp_path, config=changed)
    assert job_in_phase(job, "ramp").place.until == until
    assert job_in_phase(job, "main").place.until == "main"
    assert job_in_phase(job, "long").place.until == "long"
