"""kill -9 of snakemake, of the stage, of both: the same command goes on, and the result is the undisturbed one."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from project import STAGES, Project, copy_of

pytestmark = pytest.mark.workflow

T = TypeVar("T")
OFTEN = "checkpoint.interval=5"


def stage_process(parent: subprocess.Popen[str], stage: str) -> psutil.Process | None:
    try:
        children = psutil.Process(parent.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    for child in children:
        try:
            words = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if f"headrace.stages.{stage}" in words and "-m" in words and "bash" not in words[0]:
            return child
    return None


def wait_for(ask: Callable[[], T | None], seconds: float = 120) -> T:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = ask()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("nothing happened in time")


def at_checkpoint(project: Project) -> Path | None:
    return next(iter(project.folder.glob("results/pretrain/*/checkpoints/step-*/manifest.json")), None)


def attempts(project: Project, stage: str = "pretrain") -> list[dict[str, object]]:
    (path,) = (project.folder / "results" / stage).glob("*/attempts.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_weights(project: Project) -> dict[str, list[str]]:
    """Hashes of the slices of every tensor; those of whole files name the save that wrote them."""
    table = json.loads((project.place("pretrain") / "artifact" / "checkpoint" / "slices.json").read_text())
    return {name: [part["hash"] for part in entry["slices"]] for name, entry in table["kinds"]["model"].items()}


@pytest.mark.parametrize(
    "victims", ["both", *(pytest.param(one, marks=pytest.mark.slow) for one in ("snakemake", "stage"))]
)
def test_pretrain_goes_on_after_kill_9(tiny: Project, tokens_made: Callable[[], Project], victims: str) -> None:
    project = tokens_made()
    process = project.start("pretrain", settings=OFTEN)
    wait_for(lambda: at_checkpoint(project))
    stage = wait_for(lambda: stage_process(process, "pretrain"))
    if victims != "stage":
        process.kill()
    if victims != "snakemake":
        stage.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    again = project.run("pretrain", settings=OFTEN)
    assert again.returncode == 0, again.stderr
    starts = [entry for entry in attempts(project) if entry["event"] == "start"]
    if victims == "snakemake":
        assert len(starts) == 1, "the second snakemake follows the trainer that lives on"
    else:
        assert len(starts) == 2
        assert starts[1]["progress"] >= 5, "the second attempt starts from a checkpoint"
    assert final_weights(project) == final_weights(tiny)


def test_sigterm_saves_and_is_run_again_at_once(tiny: Project, tokens_made: Callable[[], Project]) -> None:
    project = tokens_made()
    process = project.start("pretrain", settings=OFTEN)
    wait_for(lambda: at_checkpoint(project))
    wait_for(lambda: stage_process(process, "pretrain")).send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [entry["exit"] for entry in attempts(project) if entry["event"] == "end"] == [75, 0]
    assert final_weights(project) == final_weights(tiny)


def test_a_users_mistake_is_tried_once(tokens_made: Callable[[], Project]) -> None:
    project = tokens_made()
    (shard,) = project.folder.glob("results/tokenize/*/artifact/train-00001-of-00003.bin")
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.unlink()
    shard.write_bytes(damaged)
    result = project.run("pretrain")
    assert result.returncode != 0
    assert shard.name in result.stderr
    assert [entry.get("exit") for entry in attempts(project)] == [None, 2]


def killed() -> Iterator[object]:
    """Stages and victims; what differs among stages is what the death of both leaves behind, the rest is the same."""
    for stage in ("tokenize_shards", *(stage for stage in STAGES if stage != "pretrain")):
        for victims in ("both", "snakemake", "stage"):
            often = victims == "both" or stage == "tokenize_shards"
            yield pytest.param(stage, victims, marks=pytest.mark.faults if often else pytest.mark.slow)


@pytest.mark.parametrize(("stage", "victims"), list(killed()))
def test_every_stage_goes_on_after_kill_9(tiny: Project, tmp_path: Path, stage: str, victims: str) -> None:
    program, stage = stage, stage.removesuffix("_shards")
    project = copy_of(tiny, tmp_path, STAGES[: STAGES.index(stage)])
    process = project.start(stage)
    victim = wait_for(lambda: stage_process(process, program))
    leases = "tokenize_shards-*.json" if program == "tokenize_shards" else "lease.json"
    wait_for(lambda: list(project.folder.glob(f"results/{stage}/*/{leases}")) or None, 30)
    if victims != "stage":
        process.kill()
    if victims != "snakemake":
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pytest.fail(f"{stage} ended before it could be killed; the test must be faster")
    process.communicate(timeout=60)
    if victims != "snakemake":
        assert not list(project.folder.glob(f"results/{stage}/*/done"))
    again = project.run(stage)
    assert again.returncode == 0, again.stderr
    assert project.planned(stage) == []
    if stage in {"corpus", "tokenizer", "tokenize", "convert"}:
        assert (project.place(stage) / "done").read_text() == (tiny.place(stage) / "done").read_text()


def test_ctrl_c_leaves_nothing_running(tokens_made: Callable[[], Project]) -> None:
    project = tokens_made()
    process = subprocess.Popen(
        project.command("pretrain", settings=OFTEN),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: at_checkpoint(project))
    stage = wait_for(lambda: stage_process(process, "pretrain"))
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    wait_for(lambda: not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE, 30)
    assert not list(project.folder.glob("results/pretrain/*/lease.json"))
