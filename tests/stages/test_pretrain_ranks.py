"""pretrain on several ranks, through its door: it follows one process, and neither a killed rank nor a signal to stop
costs any state."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from headrace.artifacts.tensors import load_tensors
from headrace.checkpoint.reader import steps, tensors_of
from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.launch.deadline import GRACE_SECONDS
from headrace.stages import pretrain
from headrace.stages.places import places
from headrace.stages.run import main
from headrace.training.ledger import read
from small_corpus import tokenized

pytestmark = pytest.mark.alone

SMALL = (
    "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2", "precision=fp32",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "recipe.sequence_length=16", "recipe.batch_sequences=8",
    f"recipe.tokens={128 * 30}", "train.validate_every=10", "train.validation_rows=3", "checkpoint.interval=5",
    "launch.threads=1", "launch.device=cpu", "recipe.batch_ramp=null", "recipe.extensions=[]",
)  # fmt: skip
LAYOUTS = {
    "one": ["parallel.microbatch=1"],
    "dualpipe": ["parallel.pipeline=2", "parallel.microbatch=1", "parallel.schedule=dualpipe"],
    "experts": ["parallel.data=2", "parallel.expert=2", "parallel.microbatch=1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tokenized(tmp_path_factory.mktemp("ranks"), SMALL)


def elsewhere(data: list[str], folder: Path, layout: str) -> list[str]:
    """The same run in another layout, with results of its own: layouts are not hashed."""
    source = Path(data[-1].partition("=")[2])
    shutil.copytree(source, folder / "results", ignore=shutil.ignore_patterns("pretrain"), symlinks=True)
    return [*data[:-1], f"paths.results={folder}/results", *LAYOUTS[layout]]


def artifact(words: list[str]) -> Path:
    config = load(words)
    return places(config, known_lock(config).hash)["pretrain"].artifact


def checkpoints(words: list[str]) -> Path:
    return artifact(words).parent / "checkpoints"


def weights(words: list[str]) -> dict[str, Tensor]:
    with tensors_of(artifact(words) / "checkpoint") as source:
        return {name: source.get(name) for name in source.keys()}  # noqa: SIM118 - no mapping


def losses(words: list[str]) -> list[float]:
    rows = [json.loads(line) for line in (artifact(words) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def alone(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = elsewhere(data, tmp_path_factory.mktemp("alone"), "one")
    assert main(pretrain.DOOR, words) == 0
    return words


@pytest.mark.parametrize("layout", ["dualpipe", "experts"])
def test_a_layout_of_ranks_follows_one_process(layout: str, data: list[str], alone: list[str], tmp_path: Path) -> None:
    words = elsewhere(data, tmp_path, layout)
    assert main(pretrain.DOOR, words) == 0
    assert losses(words) == pytest.approx(losses(alone), rel=1e-4)
    ours, theirs = weights(words), weights(alone)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    scores = [load_tensors(artifact(w) / "agreement.safetensors")["log_probabilities"] for w in (words, alone)]
    assert (scores[0] - scores[1]).abs().max() < 0.05
    training = json.loads((artifact(words) / "training.json").read_text())
    assert (training["ranks"], training["dispatch"]) == (2, "all_to_all" if layout == "experts" else "local")
    timeline = json.loads((artifact(words) / "timeline.json").read_text())
    assert timeline["pipeline"] == (2 if layout == "dualpipe" else 1)
    for name in ("planned", "measured"):
        events = json.loads((artifact(words) / f"timeline.{name}.trace.json").read_text())["traceEvents"]
        actions = [event["name"] for event in events if event["ph"] == "X" and event["cat"] == "compute"]
        assert sorted(actions) == sorted(row[3] for row in timeline[name]["spans"])


@pytest.fixture(scope="module")
def straight(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = elsewhere(data, tmp_path_factory.mktemp("straight"), "dualpipe")
    assert main(pretrain.DOOR, words) == 0
    return words


def started(words: list[str], step: int) -> subprocess.Popen[str]:
    """The stage as a process of its own, once it has a checkpoint of `step`."""
    command = [sys.executable, "-m", "headrace.stages.pretrain", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 120
    while not (checkpoints(words) / f"step-{step:08d}").exists():
        assert time.monotonic() < until, "no checkpoint came"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    return process


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_killed_rank_is_replaced_and_costs_nothing(data: list[str], straight: list[str], tmp_path: Path) -> None:
    words = elsewhere(data, tmp_path, "dualpipe")
    process = started(words, 10)
    ranks = [p for p in psutil.Process(process.pid).children() if "on_rank" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "rank 1 was killed by SIGKILL during" in said
    assert not any(p.is_running() for p in ranks)
    entries = read(artifact(words).parent / "ledger.jsonl")
    (failure,) = (entry for entry in entries if entry["event"] == "failure")
    assert failure["rank"] == 1
    resumed = [entry["step"] for entry in entries if entry["event"] == "resumed"]
    assert resumed[0] == 0
    assert 10 <= resumed[1] <= failure["step"] < resumed[1] + 10  # an interval, and one more while a save is written
    assert_same_weights(weights(words), weights(straight))


@pytest.mark.parametrize("layout", ["one", "dualpipe"])
def test_a_signal_to_stop_saves_and_the_next_run_goes_on(
    layout: str, data: list[str], alone: list[str], straight: list[str], tmp_path: Path
) -> None:
    words = elsewhere(data, tmp_path, layout)
    process = started(words, 10)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, said = process.communicate(timeout=GRACE_SECONDS)
    assert time.monotonic() - asked < GRACE_SECONDS / 2
    assert process.returncode == 75, said
    saved = max(steps(checkpoints(words)))
    assert f"saved at step {saved}" in said
    last = read(artifact(words).parent / "ledger.jsonl")[-1]
    assert last["event"] == "stopped"
    assert main(pretrain.DOOR, words) == 0
    assert [e["step"] for e in read(artifact(words).parent / "ledger.jsonl") if e["event"] == "resumed"] == [0, saved]
    assert_same_weights(weights(words), weights(alone if layout == "one" else straight))


def test_a_checkpoint_of_one_layout_is_taken_up_by_another(data: list[str], alone: list[str], tmp_path: Path) -> None:
    words = elsewhere(data, tmp_path, "dualpipe")
    shutil.copytree(checkpoints(alone) / "step-00000025", checkpoints(words) / "step-00000025")
    assert main(pretrain.DOOR, words) == 0
    assert losses(words) == pytest.approx(losses(alone), rel=1e-4)
