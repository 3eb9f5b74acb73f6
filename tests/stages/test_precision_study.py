"""The precision study through its door: pairing, stops and kills, divergence, what W&B gets; on a model of no size."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.stages import precision_study
from headrace.stages.places import Place, places
from headrace.stages.precision_study import DOOR, steps_done
from headrace.stages.run import main
from headrace.training.learner import build_engine
from headrace.training.trials import trials
from small_corpus import tokenized

STEPS = 24
RUNS = [f"pair-{pair}-{role}" for pair in (0, 1) for role in ("baseline", "candidate")]
SMALL = (
    "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "recipe.sequence_length=16", "recipe.batch_sequences=2",
    "recipe.tokens=6400", f"study.tokens={32 * STEPS}", "study.ablations=[]", "precision@study.candidate=fp32",
    "train.validate_every=10", "train.validation_rows=2", "checkpoint.interval=3", "launch.threads=1",
    "launch.device=cpu", "recipe.batch_ramp=null",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tokenized(tmp_path_factory.mktemp("study"), SMALL)


def place_of(words: list[str]) -> Place:
    config = load(words)
    return places(config, known_lock(config).hash)["precision_study"]


def study_of(words: list[str]) -> Any:
    return json.loads((place_of(words).artifact / "study.json").read_text())


def numbers(words: list[str]) -> Any:
    """study.json without what a clock measured."""
    study = study_of(words)
    for run in study["runs"]:
        del run["seconds"], run["tokens_per_second"]
    return study


@pytest.fixture(scope="module")
def undisturbed(data: list[str]) -> list[str]:
    words = [*data, "study.smoothing=0.9"]
    assert main(DOOR, words) == 0
    return words


def at_another_place(words: list[str], folder: Path) -> list[str]:
    """The same configuration with results of its own: only the tokens are there."""
    (folder / "results").mkdir()
    old = Path(load(words).paths.results)
    for name in ("locks", "tokenize"):
        (folder / "results" / name).symlink_to(old / name)
    return [*words, f"paths.results={folder}/results"]


def test_what_a_finished_study_leaves_behind(undisturbed: list[str]) -> None:
    place = place_of(undisturbed)
    assert sorted(path.name for path in place.artifact.iterdir()) == [
        "manifest.json",
        "precision_study.html",
        "study.json",
    ]
    assert (place.folder / "precision_study.html").read_bytes() == (
        place.artifact / "precision_study.html"
    ).read_bytes()
    assert list(place.folder.glob("runs/*/checkpoints")) == []
    for name in RUNS:
        result = json.loads((place.folder / "runs" / name / "result.json").read_text())
        assert len(result["losses"]) == result["steps"] == STEPS
        assert result["losses"][-1] < result["losses"][0]
    study = study_of(undisturbed)
    assert [run["name"] for run in study["runs"]] == RUNS
    assert {"host", "processor"} <= study["runs"][0]["machine"].keys()
    made = json.loads((place.folder / "provenance.json").read_text())["made"]
    assert made.startswith("FP32 - BF16: ")
    assert made.endswith(f"seed spread {100 * study['spread']['second_half']:.2f} %")


def test_a_pair_starts_from_the_same_weights(data: list[str]) -> None:
    weights = []
    for trial in trials(load(data)):
        config = replace(load(data), precision=trial.precision, seed=trial.seed)
        engine = build_engine(config, torch.device("cpu"))
        weights.append(torch.cat([piece.tensor.detach().flatten() for piece in engine.owned()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("masked", "eos"), [("false", None), ("true", 1)])
def test_documents_are_kept_apart_as_in_pretrain(
    masked: str, eos: int | None, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int | None] = []

    def build(*_: object, eos: int | None, **__: object) -> None:
        given.append(eos)
        raise UserError("seen enough")

    monkeypatch.setattr(precision_study, "build_engine", build)
    words = [*data, f"train.mask_documents={masked}", "seed.init=77"]  # a study that no other test makes
    assert main(DOOR, words) == 2
    assert given == [eos]


def test_the_same_format_twice_differs_by_nothing(data: list[str]) -> None:
    """Same weights, same rows, same arithmetic: whatever else differed within a pair would show here."""
    words = [*data, "precision@study.candidate=bf16"]
    assert main(DOOR, words) == 0
    study = study_of(words)
    assert all(value == 0.0 for curve in study["curves"]["each"] for value in curve)
    assert study["difference"]["validation"]["each"] == [0.0, 0.0]
    assert study["difference"]["verdict"] == "within"
    assert study["spread"]["second_half"] > 0


class Stopping:
    """Progress that ends the process' work at a step of a run, as a signal or as a crash."""

    def __init__(self, run: str, step: int, end: Callable[[], None]) -> None:
        self.run, self.step, self.end, self.name = run, step, end, ""

    def named(self, name: str) -> "Stopping":
        self.name = name
        return self

    def update(self, step: int, steps: int, tokens: int, metrics: object) -> None:
        if self.name.startswith(self.run) and step == self.step:
            self.step = -1
            self.end()

    def close(self) -> None:
        """Nothing is open."""


def crash() -> None:
    raise RuntimeError("crash")


@pytest.mark.slow
def test_sigterm_ends_with_75_and_crashes_with_1_and_the_numbers_are_the_undisturbed_ones(
    undisturbed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = at_another_place(undisturbed, tmp_path)
    folder = place_of(words).folder
    stops = (
        (Stopping("pair-0-candidate", 7, lambda: os.kill(os.getpid(), signal.SIGTERM)), 75),
        (Stopping("pair-0-candidate", 14, crash), 1),
        (Stopping("pair-1-candidate", 1, crash), 1),  # nothing of this run is saved yet
    )
    progress = []
    for stop, code in stops:
        monkeypatch.setattr(precision_study, "progress_on", lambda name, stop=stop: stop.named(name))
        assert main(DOOR, words) == code
        progress.append(steps_done(folder))
    # saved at step 7; then the checkpoint of step 12; then three finished runs
    assert progress == [STEPS + 1 + 7, STEPS + 1 + 12, 3 * (STEPS + 1)]
    assert main(DOOR, words) == 0
    assert numbers(words) == numbers(undisturbed)


@pytest.mark.slow
def test_kill_9_inside_and_between_runs(undisturbed: list[str], tmp_path: Path) -> None:
    words = at_another_place(undisturbed, tmp_path)
    runs = place_of(words).folder / "runs"
    for moment in ("pair-0-candidate/checkpoints/step-*/manifest.json", "pair-1-baseline/result.json"):
        command = [sys.executable, "-m", "headrace.stages.precision_study", *words]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not list(runs.glob(moment)):
            assert process.poll() is None, "the study ended before it could be killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not place_of(words).artifact.exists()
    assert main(DOOR, words) == 0
    assert numbers(words) == numbers(undisturbed)


def test_a_run_that_diverges_is_a_result(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*data, "recipe.optimizer.name=adamw", "recipe.learning_rate.peak=1e30", "recipe.learning_rate.final=1e30"]
    assert main(DOOR, words) == 0
    study = study_of(words)
    assert study["difference"]["verdict"] == "diverged"
    stopped = study["runs"][0]["diverged_at"]
    assert 1 < stopped <= STEPS
    assert study["difference"]["second_half"]["value"] is None
    assert "diverged" in capsys.readouterr().err.splitlines()[-1]
    assert f"pair-0-baseline at step {stopped}" in (place_of(words).artifact / "precision_study.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["study.pairs=1"], "study.pairs"),
        (["study.tokens=31"], "study.tokens=31 is less than one step of 32 tokens"),
        (["study.ablations=[per_tensor]"], "study.ablations=[per_tensor] change FP8, and study.candidate has none"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    data: list[str], capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(DOOR, [*data, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.slow
def test_every_run_is_a_wandb_run_and_all_are_one_group(data: list[str], tmp_path: Path) -> None:
    words = [*at_another_place(data, tmp_path), "study.tokens=256"]  # 8 steps
    assert main(DOOR, [*words, "tracking=offline"]) == 0
    place = place_of(words)
    records = {path.parts[-3]: json.loads(path.read_text()) for path in place.folder.glob("runs/*/tracking/run.json")}
    study = f"precision_study-{place.fingerprint}"
    assert {name: record["run_id"] for name, record in records.items()} == {name: f"{study}-{name}" for name in RUNS}
    assert {record["group"] for record in records.values()} == {study}
    assert records["pair-1-baseline"]["config"]["seed"] == {"init": 1, "data": 1}
    assert {record["wandb"] for record in records.values()} == {"offline"}
    assert len(list(place.folder.glob("runs/*/tracking/wandb/offline-run-*"))) == len(RUNS)
