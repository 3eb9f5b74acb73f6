"""What a user can get wrong: one line that says what, where and what to do, exit code 2, nothing lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from project import Project, copy_of

pytestmark = pytest.mark.workflow


def stage(name: str, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"headrace.stages.{name}", "experiment=tiny", "tracking=disabled", *words]
    clean = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env={**clean, **environment}
    )


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("pretrain: step ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("recipe.tokenz=1", "recipe.tokenz"),
        ("model.n_group=3", "model.n_group=3 must divide"),
        ("model.topk_group=9", "model.topk_group=9"),
        ("model.qk_rope_head_dim=7", "must be even"),
        ("model.vocab_size=300", "tokenizer.vocab_size"),
        ("launch.device=cuda", "launch.device=cuda"),
    ],
)
def test_settings(tiny: Project, tmp_path: Path, word: str, says: str) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize"))
    assert says in complaint(stage("pretrain", project.folder, word))


def files_corpus(folder: Path, content: bytes) -> list[str]:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_bytes(content)
    return ["corpus=files", "corpus.paths=[texts]"]


def test_an_empty_corpus(tmp_path: Path) -> None:
    assert "corpus" in complaint(stage("corpus", tmp_path, *files_corpus(tmp_path, b"")))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in complaint(stage("corpus", tmp_path, "corpus=files", "corpus.paths=[nowhere]"))


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    line = complaint(stage("corpus", tmp_path, *files_corpus(tmp_path, b"good text\n\xff\xfe bad")))
    assert "texts/a.txt" in line
    assert "10" in line, "the position of the first bad byte"


def test_a_truncated_shard(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize"))
    (shard,) = project.folder.glob("results/tokenize/*/artifact/train-00000-of-00003.bin")
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-4])
    assert shard.name in complaint(stage("pretrain", project.folder))


@pytest.mark.parametrize("file", ["model-00000.safetensors", "slices.json"])
def test_a_damaged_checkpoint_byte(tiny: Project, tmp_path: Path, file: str) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain"))
    (weights,) = project.folder.glob(f"results/pretrain/*/artifact/checkpoint/{file}")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    assert str(weights.relative_to(project.folder)) in complaint(stage("convert", project.folder))


def test_a_step_that_was_not_kept(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain"))
    line = complaint(stage("convert", project.folder, "convert.step=7"))
    assert "step 7" in line
    assert "60" in line, "the steps that there are"


def test_a_moving_average_that_was_not_kept(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain"))
    words = ("convert.weights=ema", "recipe.ema_decay=null")
    assert "recipe.ema_decay" in complaint(stage("convert", project.folder, *words))


def test_a_push_without_a_token(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate"))
    words = ("publish.repo_id=me/model", "publish.push=true", "publish.allow_dirty=true")
    line = complaint(stage("publish", project.folder, *words, HF_HOME=str(tmp_path / "home")))
    assert "HF_TOKEN" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(
            "mounting a small file system needs root: would check that a full disk ends with one line and exit 2"
        )
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(tiny: Project, tmp_path: Path, small_disk: Path) -> None:
    project = copy_of(tiny, tmp_path / "project", ("corpus", "tokenizer", "tokenize"))
    (tokenize,) = (project.folder / "results" / "tokenize").iterdir()
    pretrain = project.folder / "results" / "pretrain"
    pretrain.symlink_to(small_disk)
    ended = stage("pretrain", project.folder, "model.hidden_size=128")
    *saves, line = [text for text in ended.stderr.splitlines() if not text.startswith("pretrain: step")]
    assert ended.returncode == 2, ended.stderr
    assert "the disk is full" in line
    assert saves and all("could not be saved" in text for text in saves), "training goes on without a save"
    assert [path for path in small_disk.rglob("*.safetensors") if "tmp" not in path.parent.name] == []
    assert tokenize.exists()
