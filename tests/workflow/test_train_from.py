"""A run that continues another, through the stage's door: a hashed parent, no row read twice."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.config.compose import load
from project import Project, copy_of

pytestmark = pytest.mark.workflow


def pretrain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace.stages.pretrain", "experiment=tiny", "tracking=disabled", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def test_a_run_goes_on_behind_its_source_and_names_it(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain"))
    source = tiny.place("pretrain")
    result = pretrain(project.folder, f"train.from={source.name}@60", "recipe.tokens=20480")
    assert result.returncode == 0, result.stderr
    artifact = project.place("pretrain") / "artifact"
    manifest = json.loads((artifact / "manifest.json").read_text())
    checkpoint = json.loads((source / "checkpoints" / "step-00000060" / "manifest.json").read_text())
    assert manifest["inputs"]["train.from"] == checkpoint["hash"]
    facts = json.loads((artifact / "training.json").read_text())
    before = json.loads((source / "artifact" / "training.json").read_text())
    assert (
        facts["first_position"] == before["position"] == 4 * 4 + 50 * 8
    )  # the ramp's steps and those of the full batch
    assert facts["validation_loss"] < before["validation_loss"]


def test_another_order_of_the_data_starts_at_its_beginning(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain"))
    words = [f"train.from={tiny.place('pretrain').name}@60", "recipe.tokens=20480", "seed.data=5"]
    assert pretrain(project.folder, *words).returncode == 0
    assert json.loads((project.place("pretrain") / "artifact" / "training.json").read_text())["first_position"] == 0


def imported(folder: Path, hub: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace.cli", "import", str(hub)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def test_training_goes_on_from_a_hub_folder_of_the_same_tokenizer_alone(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain"))
    hub = shutil.copytree(tiny.place("convert") / "artifact", tmp_path / "hub")
    (hub / "manifest.json").unlink()
    made = imported(project.folder, hub)
    assert made.returncode == 0, made.stderr
    named = next(word for word in made.stdout.split() if word.startswith("train.from="))
    result = pretrain(project.folder, named)
    assert result.returncode == 2
    assert "its model.rope_scaling is" in result.stderr  # it was trained on to a longer context
    scaling = vars(load(["experiment=tiny"]).recipe.extensions[-1].rope_scaling)
    written = ",".join(f"{key}:{value}" for key, value in scaling.items())
    words = (named, f"model.rope_scaling={{{written}}}")
    result = pretrain(project.folder, *words, "recipe.learning_rate.warmup_steps=0")
    assert result.returncode == 0, result.stderr
    facts = json.loads((project.place("pretrain") / "artifact" / "training.json").read_text())
    before = json.loads((tiny.place("pretrain") / "artifact" / "training.json").read_text())
    assert facts["first_position"] == 0
    assert facts["validation_loss"] < before["validation_loss"]  # as long again, from where that run ended

    result = pretrain(project.folder, *words, "model.rope_theta=5000")
    assert result.returncode == 2
    assert "model.rope_theta is 10000.0, this run's 5000.0" in result.stderr

    with (hub / "tokenizer.json").open("a") as file:
        file.write("\n")
    named = next(word for word in imported(project.folder, hub).stdout.split() if word.startswith("train.from="))
    result = pretrain(project.folder, named, *words[1:])
    assert result.returncode == 2
    assert "another tokenizer" in result.stderr


def test_a_source_that_is_not_there_is_named(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain"))
    result = pretrain(project.folder, "train.from=0123456789ab@60")
    assert result.returncode == 2
    assert "train.from=0123456789ab@60" in result.stderr
    result = pretrain(project.folder, f"train.from={tiny.place('pretrain').name}@59")
    assert result.returncode == 2
    assert "no checkpoint of step 59" in result.stderr
