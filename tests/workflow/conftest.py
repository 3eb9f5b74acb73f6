"""The real snakemake on experiment=tiny: one whole run for all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from project import Project, copy_of


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Made once for all workers."""
    beside = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if beside else tmp_path_factory.getbasetemp()
    project, made = Project(folder / "tiny"), folder / "tiny-is-made"
    with FileLock(folder / "tiny.lock"):
        if not project.folder.exists():
            project.folder.mkdir()
            result = project.run()
            assert result.returncode == 0, result.stderr
            made.touch()
        assert made.exists(), "the run failed in another worker"
    return project


@pytest.fixture
def tokens_made(tiny: Project, tmp_path: Path) -> Callable[[], Project]:
    return lambda: copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize"))
