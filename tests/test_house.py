"""The house keeps its rules: who may import whom, no pickle, one docstring per module, tests beside sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "headrace"
LINES = [
    {"cli"},
    {"stages"},
    {"training", "evaluation", "publication", "reporting"},
    {"conversion", "planning"},
    {"pipeline", "checkpoint", "recipe"},
    {"parallel"},
    {"model", "corpus", "tokens"},
    {"fp8"},
    {"kernels"},
    {"artifacts", "tracking", "launch", "config"},
]
EVERYWHERE = {"errors"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def height(room: str) -> int:
    return next(index for index, line in enumerate(LINES) if room in line)


def imported_rooms(tree: ast.AST) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("headrace.")}
    return rooms


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path: Path) -> None:
    room = room_of(path)
    if room in {"__init__", *EVERYWHERE}:
        assert not imported_rooms(ast.parse(path.read_text()))
        return
    for other in imported_rooms(ast.parse(path.read_text())) - EVERYWHERE - {room}:
        assert height(other) > height(room), f"{path.relative_to(ROOT)} imports {other}, which is not below {room}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path.relative_to(ROOT)) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_no_source_file_is_longer_than_a_person_reads() -> None:
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_vague_names_are_not_used() -> None:
    assert [path for path in SOURCES if path.stem in {"utils", "common", "helpers", "misc"}] == []
