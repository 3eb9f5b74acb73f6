"""constraints.txt, environment.yml and pyproject.toml say the same versions."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    return {normal(name): version for name, version in pins.items()}


def direct_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return {normal(re.split(r"[=<>~!; \[]", word)[0]) for word in words}


def test_environment_yml_mirrors_the_constraints() -> None:
    tree = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in tree["dependencies"] if isinstance(entry, dict)]
    assert {normal(name): version for name, version in (line.split("==") for line in pip)} == constraints()


def test_every_direct_dependency_is_pinned() -> None:
    assert direct_dependencies() - set(constraints()) == set()


def test_torch_is_exactly_the_release_that_everything_was_tested_with() -> None:
    assert constraints()["torch"] == "2.13.0"
    assert "torch==2.13.0" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_what_is_installed_is_what_is_pinned() -> None:
    pins = constraints()
    wrong = {
        name: (importlib.metadata.version(name), pins[name])
        for name in direct_dependencies()
        if importlib.metadata.version(name).split("+")[0] != pins[name]
    }
    assert wrong == {}
