"""The real snakemake on experiment=tiny: one whole run for all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from project import Project, copy_of


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("tiny"))
    result = project.run()
    assert result.returncode == 0, result.stderr
    return project


@pytest.fixture
def tokens_made(tiny: Project, tmp_path: Path) -> Callable[[], Project]:
    return lambda: copy_of(tiny, tmp_path, ("corpus", "tokenizer", "tokenize"))
