"""A package `wandb` as `sync` calls it, as a program and as an API; it writes down what it is told and sends nothing.

Names and signatures are those of wandb 0.31. What it marks as uploaded, the real program passes over.
"""

import json
import os
from pathlib import Path

import pytest

_API = """
import json, os
from types import SimpleNamespace


def tell(*call):
    with open(os.environ["WANDB_TOLD"], "a") as file:
        file.write(json.dumps(call) + chr(10))


class Api:
    def __init__(self, timeout):
        tell("api", timeout)

    def artifact(self, name):
        return name

    def run(self, path):
        return SimpleNamespace(use_artifact=lambda artifact: tell("use_artifact", path, artifact))
"""
_PROGRAM = """
import sys
from pathlib import Path
from wandb import tell

tell("program", *sys.argv[1:])
for fragment in sys.argv[2:]:
    (file,) = Path(fragment).glob("*.wandb")
    file.with_suffix(".wandb.synced").touch()
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the package before the real one in processes that are started; returns the file of its calls."""
    package, told = folder / "stand-in" / "wandb", folder / "told.jsonl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_API)
    (package / "__main__.py").write_text(_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("WANDB_TOLD", str(told))
    return told


def calls(told: Path, kind: str) -> list[list[str]]:
    """What was called, in order, without the name of the call."""
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    return [line[1:] for line in lines if line[0] == kind]
