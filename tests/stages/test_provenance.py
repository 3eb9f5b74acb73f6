"""Which commit made a result: of a source checkout alone, and unknown wherever git does not say."""

import shutil
import subprocess
from pathlib import Path

import pytest

from headrace.artifacts.files import write_json
from headrace.stages import provenance

NOTHING = {"commit": None, "dirty": False, "diff": None}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@example.org", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose source is the package, with one commit."""
    folder = tmp_path / "repository"
    (folder / "src" / "headrace").mkdir(parents=True)
    (folder / "src" / "headrace" / "__init__.py").write_text('"""Source."""\n')
    (folder / ".gitignore").write_text(".venv/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "Begin")
    monkeypatch.setattr(provenance, "_PACKAGE", folder / "src" / "headrace")
    return folder


def test_a_checkout_has_its_commit(repository: Path) -> None:
    assert provenance.code_version() == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False, "diff": None}


@pytest.mark.parametrize("name", ["src/headrace/__init__.py", "untracked.txt"])
def test_changes_and_new_files_are_uncommitted_changes(repository: Path, tmp_path: Path, name: str) -> None:
    (repository / name).write_text("changed\n")
    code = provenance.code_version()
    assert code["commit"] == git(repository, "rev-parse", "HEAD") and code["dirty"] and code["diff"]
    provenance.write(tmp_path, provenance.describe({}))
    assert (tmp_path / "code.diff").exists() == (name != "untracked.txt")


@pytest.mark.parametrize("inside", [".venv/lib/python3.12/site-packages/headrace", "vendor/headrace", "headrace"])
def test_a_package_installed_in_somebody_elses_repository_has_none(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    (repository / inside).mkdir(parents=True)
    (repository / ".gitignore").write_text("changed\n")
    monkeypatch.setattr(provenance, "_PACKAGE", repository / inside)
    assert provenance.code_version() == NOTHING
    provenance.write(tmp_path, provenance.describe({}))
    assert not (tmp_path / "code.diff").exists(), "of another's work tree"


@pytest.mark.parametrize("failing", ["show-toplevel", "HEAD", "diff", "ls-files"])
def test_where_git_does_not_answer_nothing_is_known(
    repository: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    real = subprocess.run

    def run(command: list[str], **options: object) -> object:
        if any(failing in word for word in command):
            raise subprocess.TimeoutExpired(command, 30)
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", run)
    assert provenance.code_version() == NOTHING


def test_without_git_nothing_is_known(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert provenance.code_version() == NOTHING


def test_a_repository_that_git_refuses_is_unknown(repository: Path) -> None:
    """As one of another owner in a container, or a damaged one."""
    (repository / ".git" / "HEAD").write_text("nothing\n")
    assert provenance.code_version() == NOTHING


def test_codes_are_those_of_all_that_a_run_goes_on_from(tmp_path: Path) -> None:
    def made(folder: str, parents: dict[str, str], from_: str | None = None) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True)
        write_json(path / "stage.json", {"parents": parents, "config": {"train": {"from": from_}}})
        write_json(path / "provenance.json", {"code": {"commit": folder}})
        return path

    made("corpus/c0", {})
    made("corpus/c1", {})
    made("tokenize/t0", {"corpus": "c0"})
    made("tokenize/t1", {"corpus": "c1"})
    made("import/i0", {})
    made("pretrain/p0", {"tokenize": "t0"}, "i0@0")
    made("pretrain/p1", {"tokenize": "t0"}, "p0@3")
    run = made("pretrain/p2", {"tokenize": "t1"}, "p1@7")
    names = ("pretrain/p2", "tokenize/t1", "pretrain/p1", "corpus/c1", "tokenize/t0", "pretrain/p0", "corpus/c0")
    found = provenance.codes([run, run])
    assert found == {tmp_path / name: {"commit": name} for name in (*names, "import/i0")}
    shutil.rmtree(tmp_path / "pretrain/p1")
    found = provenance.codes([run])
    assert found.pop(tmp_path / "pretrain/p1") is None
    assert found == {tmp_path / name: {"commit": name} for name in ("pretrain/p2", "tokenize/t1", "corpus/c1")}
