"""One corpus and one undisturbed run for all; whatever a test leaves running or mounted is ended after it."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.product import SETTINGS, STEP_TOKENS, Product, running
from small_corpus import tokenized

STEPS = 24
Fresh = Callable[..., Product]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tokenized(tmp_path_factory.mktemp("corpus"), (*SETTINGS, f"recipe.tokens={STEP_TOKENS * STEPS}"))


@pytest.fixture(scope="session")
def undisturbed(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Product:
    """A finished run that nothing happened to, with all its checkpoints; rows.jsonl tells which rows it read."""
    folder = tmp_path_factory.mktemp("undisturbed")
    product = Product.fresh(data, folder).with_fault("rows", file=str(folder / "rows.jsonl"))
    stage = product.run()
    assert stage.code == 0, stage.said
    return product


@pytest.fixture
def fresh(data: list[str], tmp_path: Path) -> Iterator[Fresh]:
    """Makes runs of their own, each in a folder of its own, with other settings."""
    made = 0

    def make(*settings: str) -> Product:
        nonlocal made
        made += 1
        folder = tmp_path / str(made)
        folder.mkdir()
        return Product.fresh(data, folder, *settings)

    yield make
    for process in running(str(tmp_path)):
        process.kill()
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in mounts:
        if mount.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "--lazy", mount], check=True)
