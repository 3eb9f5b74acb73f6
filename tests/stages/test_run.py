"""The run directory: exit codes, idempotence, followers, kills, and what a body is allowed to see."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.launch.deadline import StopRequested
from headrace.stages import run as runs
from headrace.stages.places import Place, places
from headrace.stages.run import Door, Outcome, Run, main

WORDS = ("experiment=tiny", "tracking=disabled", "corpus=files")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    return [*WORDS, f"corpus.paths=[{tmp_path}/text.txt]", f"paths.results={tmp_path}/results"]


def place_of(words: list[str], stage: str = "corpus") -> Place:
    config = load(words)
    return places(config, known_lock(config).hash)[stage]


def write_one_file(run: Run) -> Outcome:
    (run.output / "result.txt").write_text("result")
    return Outcome("one file", {"files": 1})


def test_a_finished_stage_is_verified_and_not_run_again(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def body(run: Run) -> Outcome:
        calls.append(1)
        return write_one_file(run)

    assert main(Door("corpus", body), words) == 0
    place = place_of(words)
    manifest = json.loads((place.artifact / "manifest.json").read_text())
    assert place.done.read_text() == manifest["hash"] + "\n"
    assert (place.folder.parents[1] / "latest" / "corpus").resolve() == place.folder.resolve()
    place.done.unlink()
    assert main(Door("corpus", body), words) == 0
    assert len(calls) == 1
    assert place.done.read_text() == manifest["hash"] + "\n"
    (place.artifact / "result.txt").write_text("damage")
    assert main(Door("corpus", body), words) == 2
    assert "result.txt" in capsys.readouterr().err


def test_an_input_is_hashed_once_and_whole_after_it_was_taken_quickly(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def corpus(run: Run) -> Outcome:
        (run.output / "text.bin").write_bytes(bytes(2 << 20))
        return write_one_file(run)

    def tokenizer(run: Run) -> Outcome:
        artifact = run.input("corpus", quick=True)
        (artifact / "text.bin").write_bytes(b"\1" * (2 << 20))  # large, so quick does not see it
        assert run.input("corpus", quick=True) == artifact and list(run.inputs) == ["corpus"]
        with pytest.raises(UserError, match=r"text\.bin"):
            run.input("corpus")
        (artifact / "text.bin").write_bytes(bytes(2 << 20))
        run.input("corpus")
        (artifact / "result.txt").write_text("damage")
        run.input("corpus")  # was verified
        run.input("corpus", quick=True)
        return write_one_file(run)

    assert main(Door("corpus", corpus), words) == 0
    assert main(Door("tokenizer", tokenizer), words) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("file x: mend it"), 2, "file x: mend it"),
        (OSError(errno.ENOSPC, "No space left on device", "results/x"), 2, "the disk is full (results/x)"),
        (StopRequested("SIGTERM"), 75, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("broken"), 1, "RuntimeError: broken"),
    ],
)
def test_every_end_has_its_exit_code_and_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, says: str
) -> None:
    def body(run: Run) -> Outcome:
        (run.output / "half").write_text("half")
        raise error

    assert main(Door("corpus", body), words) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    place = place_of(words)
    assert not place.artifact.exists()
    assert not place.done.exists()
    assert not (place.folder / "lease.json").exists()
    assert main(Door("corpus", write_one_file), words) == 0
    assert sorted(path.name for path in place.artifact.iterdir()) == ["manifest.json", "result.txt"]


def test_a_wrong_setting_ends_with_2_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Door("corpus", write_one_file), ["recipe.tokenz=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("headrace corpus: config: ")


def test_a_missing_parent_is_named_with_the_command_that_makes_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Door("tokenizer", write_one_file), words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"python -m headrace.stages.corpus {words[0]}" in line


def test_a_body_cannot_read_what_its_fingerprint_does_not_cover(words: list[str]) -> None:
    def body(run: Run) -> Outcome:
        assert run.config.corpus.source == "files"
        with pytest.raises(AssertionError, match="evaluate"):
            _ = run.config.evaluate
        return write_one_file(run)

    assert main(Door("corpus", body), words) == 0


def test_three_times_75_without_progress_stop_with_the_reason(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def body(run: Run) -> Outcome:
        raise StopRequested("SIGTERM")

    assert [main(Door("corpus", body), words) for _ in range(4)] == [75, 75, 75, 1]
    assert "without progress" in capsys.readouterr().err.splitlines()[-1]


SLOW = """
import sys, time
from pathlib import Path
from headrace.stages.run import Door, Outcome, main
def body(run):
    with (run.folder / "bodies").open("a") as file:
        file.write("x")
    (run.output / "result.txt").write_text("result")
    deadline = time.monotonic() + 60
    while not (run.folder / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return Outcome("slow", {})
sys.exit(main(Door("corpus", body), sys.argv[1:]))
"""


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_a_second_copy_follows_the_first_and_takes_its_result(words: list[str]) -> None:
    place = place_of(words)
    first = start(words)
    wait_for(place.folder / "bodies")
    second = start(words)
    assert second.stderr
    assert f"following process {first.pid}" in second.stderr.readline()
    (place.folder / "go").touch()
    assert first.wait(30) == 0
    assert second.wait(30) == 0
    assert (place.folder / "bodies").read_text() == "x"


def test_a_killed_stage_leaves_nothing_that_is_taken_for_done(words: list[str]) -> None:
    place = place_of(words)
    first = start(words)
    wait_for(place.folder / "artifact.partial" / "result.txt")
    first.kill()
    first.wait()
    assert not place.artifact.exists()
    assert not place.done.exists()
    (place.folder / "go").touch()
    assert start(words).wait(30) == 0
    assert (place.folder / "bodies").read_text() == "xx"


def test_what_killed_processes_were_writing_is_gone_at_the_end_and_the_files_of_living_ones_stay(
    words: list[str],
) -> None:
    folder = place_of(words).folder
    (folder / "shards").mkdir(parents=True)
    stale = [folder / ".plan.json.0a1b2c3d.tmp", folder / "shards" / ".train-00000.bin.0a1b2c3d.tmp"]
    alive = folder / "shards" / ".train-00001.bin.0a1b2c3d.tmp"
    alive.touch()
    os.utime(alive, (time.time() + 60, time.time() + 60))
    for _ in ("made", "found"):
        for path in stale:
            path.touch()
            os.utime(path, (1e9, 1e9))
        assert main(Door("corpus", write_one_file), words) == 0
        assert [path.exists() for path in (*stale, alive)] == [False, False, True]


def test_sigterm_ends_with_75(words: list[str]) -> None:
    place = place_of(words)
    process = start(words)
    wait_for(place.folder / "bodies")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


def test_the_time_budget_ends_with_75(words: list[str]) -> None:
    started = time.monotonic()
    assert start([*words, "launch.minutes=0.05"]).wait(30) == 75
    assert time.monotonic() - started < 20


def test_a_crash_between_commit_and_done_is_finished_by_the_next_run(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Tracker, "close", crash)
        assert main(Door("corpus", write_one_file), words) == 1
    place = place_of(words)
    assert place.artifact.exists()
    assert not place.done.exists()
    assert json.loads((place.folder / "provenance.json").read_text())["made"] == "one file"
    assert main(Door("corpus", write_one_file), words) == 0
    assert place.done.exists()


def test_secrets_never_reach_log_or_terminal(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = "hf_" + "Canary7" * 5
    monkeypatch.setenv("HF_TOKEN", canary)

    def body(run: Run) -> Outcome:
        run.log.warning("token %s", os.environ["HF_TOKEN"])
        raise RuntimeError(f"push with {canary} failed")

    assert main(Door("corpus", body), words) == 1
    assert canary not in capsys.readouterr().err
    for path in place_of(words).folder.rglob("*"):
        assert not path.is_file() or canary.encode() not in path.read_bytes(), path
