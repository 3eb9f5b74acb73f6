"""Checkpoints on disk: published by one rename, believed only after every byte is verified.

A checkpoint is a folder `step-%08d`:

    model.safetensors       parameters and router biases, by their names in the model's state_dict
    optimizer.safetensors   moments, as `<parameter name>/<moment>`
    state.json              step, tokens, data position, fingerprint, random state, history: all that is no tensor
    manifest.json           size and xxh3 hash of the three, bound to the step

It is written under a temporary name, every file fsynced, and renamed: a crash at any point leaves the checkpoints
that were there or the new one, never a mix. There is no `latest` file that could be torn or point into nothing:
"latest" is computed, newest step first, by validation. No known format notices a flipped bit on load by itself; here
the hashes do, and the run falls back to the newest whole checkpoint and says so.

One process writes a folder at a time (the stage's lease sees to it). No pickle is read or written.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headrace.artifacts import manifest
from headrace.artifacts.files import read_json, write_json
from headrace.artifacts.tensors import save_tensors
from headrace.errors import UserError

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
LEFTOVER = ".unfinished-"
_NAME = re.compile(r"step-(\d{8,})")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. The tensors are read from its two files when they are asked for."""

    step: int
    folder: Path
    state: dict[str, Any]
    manifest_hash: str

    @property
    def model_file(self) -> Path:
        """The safetensors file of parameters and router biases."""
        return self.folder / MODEL

    @property
    def optimizer_file(self) -> Path:
        """The safetensors file of the optimizer's moments."""
        return self.folder / OPTIMIZER


def save(
    folder: Path,
    step: int,
    model_tensors: Mapping[str, Tensor],
    optimizer_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Publish `folder/step-%08d` and return it.

    A whole checkpoint of the step that is already there stays as it is (a run's state at a step is one thing only); a
    damaged one is replaced. `state` must be JSON without NaN; `step` is added to it.
    """
    assert state.get("step", step) == step, "state and step disagree"
    final = checkpoint_folder(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    if final.exists():
        try:
            return load(final).folder
        except UserError as error:
            _LOG.warning("replacing a damaged checkpoint: %s", error)
            remove(final)
    staging = folder / f"{LEFTOVER}{final.name}"
    try:
        staging.mkdir()
        _write(staging, step, model_tensors, optimizer_tensors, state)
        manifest.commit(staging, final)
    except BaseException:
        manifest.discard(staging)  # a full disk is not kept full by half a checkpoint
        raise
    return final


def _write(
    staging: Path,
    step: int,
    model_tensors: Mapping[str, Tensor],
    optimizer_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    save_tensors(staging / MODEL, model_tensors)
    save_tensors(staging / OPTIMIZER, optimizer_tensors)
    write_json(staging / STATE, {**state, "step": step})
    manifest.build(
        staging,
        kind="checkpoint",
        producer={"fingerprint": state.get("fingerprint")},
        inputs={},
        summary={"step": step},
        algorithm="xxh3",
    )


def load(folder: Path, quick: bool = False) -> Checkpoint:
    """Verify one checkpoint folder byte by byte; a damaged or foreign one is a `UserError` that names the file.

    `quick` hashes small files only: for ranks whose first one has verified it.
    """
    found = manifest.verify(folder, manifest.SMALL if quick else None)
    missing = {MODEL, OPTIMIZER, STATE} - set(found.files)
    if found.kind != "checkpoint" or missing:
        raise UserError(f"{folder}: not a checkpoint: its manifest lacks {', '.join(sorted(missing)) or 'that kind'}")
    state = read_json(folder / STATE)
    named = _NAME.fullmatch(folder.name)
    if not isinstance(state, dict) or not named or not int(named[1]) == state.get("step") == found.summary.get("step"):
        raise UserError(f"{folder / STATE}: belongs to another step than the folder's name and manifest say")
    return Checkpoint(int(named[1]), folder, state, found.hash)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies under `folder`."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder under `folder`, whole or not, ascending."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def at_step(folder: Path, step: int) -> Checkpoint:
    """The verified checkpoint of one step; `UserError` where it is missing or damaged."""
    if step not in steps(folder):
        kept = ", ".join(map(str, steps(folder))) or "none"
        raise UserError(f"{folder}: no checkpoint of step {step}; kept steps: {kept}")
    return load(checkpoint_folder(folder, step))


def newest_valid(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are named in a warning. None where no whole one is left."""
    found = steps(folder)
    for step in reversed(found):
        try:
            return load(checkpoint_folder(folder, step))
        except UserError as error:
            _LOG.warning("checkpoint of step %d is not used, falling back to an older one: %s", step, error)
    if found:
        _LOG.warning(
            "%s: none of %d checkpoints is whole; training starts again from its beginning", folder, len(found)
        )
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint folder: renamed first, so that a crash in between leaves no half checkpoint behind."""
    manifest.discard(folder.rename(folder.with_name(f"{LEFTOVER}remove-{folder.name}")))


def clear_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or removal left under `folder`."""
    for path in folder.glob(f"{LEFTOVER}*"):
        manifest.discard(path)
