"""pretrain on several ranks, through its door: it follows one process, and a killed rank costs no state."""

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

from headrace.artifacts.tensors import load_tensors
from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.stages import pretrain
from headrace.stages.places import places
from headrace.stages.run import main
from small_corpus import tokenized

SMALL = (
    "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2", "precision=fp32",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "recipe.sequence_length=16", "recipe.batch_sequences=8",
    f"recipe.tokens={128 * 60}", "train.validate_every=20", "train.validation_rows=3", "checkpoint.interval=10",
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
    ours, theirs = (load_tensors(artifact(w) / "model.safetensors") for w in (words, alone))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    scores = [load_tensors(artifact(w) / "agreement.safetensors")["log_probabilities"] for w in (words, alone)]
    assert (scores[0] - scores[1]).abs().max() < 0.05
    timeline = json.loads((artifact(words) / "timeline.json").read_text())
    assert timeline["pipeline"] == (2 if layout == "dualpipe" else 1)


def test_a_killed_rank_ends_the_run_with_its_name_and_costs_nothing(data: list[str], tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()
    straight = elsewhere(data, tmp_path / "straight", "dualpipe")
    assert main(pretrain.DOOR, straight) == 0
    words = elsewhere(data, tmp_path / "broken", "dualpipe")
    command = [sys.executable, "-m", "headrace.stages.pretrain", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    checkpoints = artifact(words).parent / "checkpoints"
    until = time.monotonic() + 60
    while not (checkpoints / "step-00000020").exists():
        assert time.monotonic() < until, "no checkpoint came"
        time.sleep(0.005)
    ranks = [p for p in psutil.Process(process.pid).children() if "on_rank" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - killed < 5
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    assert "was killed by SIGKILL during" in last
    assert "goes on from the last checkpoint" in last
    assert not any(p.is_running() for p in ranks)
    assert main(pretrain.DOOR, words) == 0
    ours, theirs = (load_tensors(artifact(w) / "model.safetensors") for w in (words, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_one_layout_is_taken_up_by_another(data: list[str], alone: list[str], tmp_path: Path) -> None:
    words = elsewhere(data, tmp_path, "dualpipe")
    theirs = artifact(alone).parent / "checkpoints"
    ours = artifact(words).parent / "checkpoints"
    shutil.copytree(theirs / "step-00000050", ours / "step-00000050")
    assert main(pretrain.DOOR, words) == 0
    assert losses(words) == pytest.approx(losses(alone), rel=1e-4)
