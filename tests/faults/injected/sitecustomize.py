"""Faults that only the inside of a rank can do to itself. Python imports this where its folder lies on PYTHONPATH.

`INJECTED_FAULT` is JSON: {"fault": one of `FAULTS`, ...its own details}; "once" is a file whose existence says that it
has happened. The product knows nothing of this: modules are changed as they are imported, and only in ranks. What is
changed are names of the product's interior, so a fault that can no longer be placed fails the rank that should have it.
"""

import importlib.abc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

DETAILS = json.loads(os.environ.get("INJECTED_FAULT", "{}"))
RANK = int(os.environ.get("RANK", "-1"))
STEP = [0]  # the step that is being computed, counted from 1


class After(importlib.abc.MetaPathFinder):
    """Calls `change` with a module once it has been executed."""

    def __init__(self, module: str, change: Callable[[Any], None]) -> None:
        self._module, self._change = module, change
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        execute = found.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._change(module)

        found.loader.exec_module = exec_module
        return found


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """`owner.name(...)` becomes `around(the old one, ...)`."""
    old = getattr(owner, name)
    setattr(owner, name, lambda *given, **named: around(old, *given, **named))


def now(step: int | None = None, name: str = "") -> bool:
    """Whether it is this rank's turn, in the step of the details or in `step`; with "once", the first time only."""
    if DETAILS["rank"] != RANK or STEP[0] != (step or DETAILS["step"]):
        return False
    if "once" in DETAILS:
        happened = Path(DETAILS["once"] + name)
        if happened.exists():
            return False
        happened.touch()
    return True


def counting_steps(engine: Any) -> None:
    """Know which step it is, from the label that the trainer gives it."""

    def step(old: Callable[..., Any], self: Any, rows: Any, *given: Any, **named: Any) -> Any:
        label = next(word for word in (*given, *named.values()) if isinstance(word, str) and word.startswith("step "))
        STEP[0] = int(label.removeprefix("step "))
        return old(self, rows, *given, **named)

    wrap(engine.Engine, "step", step)


def on_action(change: Callable[[str], None]) -> None:
    """Call `change` with the kind of every computation of the schedule (F, B, W, OVERLAP_F_B), before it is done."""

    def compute(old: Callable[..., Any], self: Any, action: Any) -> Any:
        change(action.kind.value if hasattr(action.kind, "value") else str(action.kind))
        return old(self, action)

    After("headrace.pipeline.execute", lambda module: wrap(module._Execution, "_compute", compute))


def reset() -> None:
    """Cut all connections to other ranks, for both sides, before an action; "at" is the step for each kind of them."""

    def change(kind: str) -> None:
        if kind in DETAILS["at"] and now(DETAILS["at"][kind], f".{kind}"):
            cut()

    on_action(change)


def cut() -> None:
    """Have the kernel reset this process's connections to other ranks: those of gloo, not that to the parent."""
    parent = json.loads(os.environ["HEADRACE_RANKS"])["port"]
    said = subprocess.run(["ss", "-tnpH", "state", "established"], capture_output=True, text=True, check=True).stdout
    for line in said.splitlines():
        if f"pid={os.getpid()}," in line:
            here, there = (end.rpartition(":")[2] for end in line.split()[2:4])
            if str(parent) not in (here, there):
                subprocess.run(["ss", "-K", "sport", "=", here, "dport", "=", there], capture_output=True, check=True)


def crash() -> None:
    """An exception in a step, however often it is tried."""

    def change(kind: str) -> None:
        if now():
            raise ArithmeticError("this step cannot be computed")

    on_action(change)


def hang() -> None:
    """A computation that never ends."""

    def doing(old: Callable[..., Any], self: Any, action: str) -> None:
        old(self, action)
        if now():
            time.sleep(1e6)

    After("headrace.pipeline.execute", lambda module: wrap(module._Execution, "_doing", doing))


def memory() -> None:
    """A computation that needs more memory than the rank may have: the kernel ends the process."""

    def change(kind: str) -> None:
        if now():
            (Path(DETAILS["group"]) / "cgroup.procs").write_text(str(os.getpid()))
            bytearray(64 << 20)[::4096] = b"\1" * (64 << 20 >> 12)

    on_action(change)


def not_a_number() -> None:
    """One element of one gradient on one rank is NaN, in one step."""

    def step(old: Callable[..., Any], self: Any, *given: Any, **named: Any) -> Any:
        losses = old(self, *given, **named)
        if now():
            piece = next(piece for piece in self.reduction.pieces if ".mlp.experts." in piece.name)
            piece.tensor.grad.view(-1)[3] = float("nan")
        return losses

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "step", step))


TENSORS: dict[str, Any] = {}


def flip() -> None:
    """One bit of one weight, or one moment, on one rank changes behind everybody's back, between two steps."""

    def step(old: Callable[..., Any], self: Any, *given: Any, **named: Any) -> Any:
        for what, step in DETAILS["at"].items():
            if now(step, f".{what}"):
                import torch

                with torch.no_grad():
                    TENSORS[what].data.view(-1).view(torch.int16)[5] ^= 1 << 6
        return old(self, *given, **named)

    def made(old: Callable[..., Any], self: Any, pieces: list[Any], *given: Any, **named: Any) -> None:
        old(self, pieces, *given, **named)
        TENSORS.update(weight=pieces[0].tensor, moment=self.moments()[0].tensor)

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "step", step))
    After("headrace.training.optimizer", lambda module: wrap(module.Optimizer, "__init__", made))


def slow() -> None:
    """From a step on, every computation of one rank takes half as long again, from when what it needs is there."""
    began = [0.0]

    def doing(old: Callable[..., Any], self: Any, action: str) -> None:
        old(self, action)
        began[0] = time.monotonic()

    def compute(old: Callable[..., Any], self: Any, action: Any) -> None:
        old(self, action)
        if DETAILS["rank"] == RANK and STEP[0] >= DETAILS["from_step"]:
            time.sleep(0.5 * (time.monotonic() - began[0]))

    def change(module: Any) -> None:
        wrap(module._Execution, "_doing", doing)
        wrap(module._Execution, "_compute", compute)

    After("headrace.pipeline.execute", change)


def late() -> None:
    """One message in five is 200 ms late, as where its packets were lost and sent again (TCP's least time-out)."""
    import random

    chance = random.Random(RANK)

    def transfer(old: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if chance.random() < 0.2:
            time.sleep(0.2)
        return old(*given, **named)

    def change(module: Any) -> None:
        wrap(module.Transfers, "send", transfer)

    After("headrace.pipeline.transfer", change)


def clock() -> None:
    """The wall clock is off by so many seconds; the monotonic one goes on."""
    true = time.time
    time.time = lambda: true() + DETAILS["seconds"]


def sync_error() -> None:
    """So many fsyncs of what is saved fail with EIO, for each of some steps."""
    true, left = os.fsync, DETAILS["times"]

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        for step in left:
            if left[step] and DETAILS["rank"] == RANK and f"/.unfinished-{step}-" in path:
                left[step] -= 1
                raise OSError(5, "Input/output error")
        true(descriptor)

    os.fsync = fsync


def rows() -> None:
    """Nothing bad: every rank writes down which rows it reads for which step."""

    def step(old: Callable[..., Any], self: Any, rows_RL: Any, *given: Any, **named: Any) -> Any:
        result = old(self, rows_RL, *given, **named)
        import hashlib

        rows = [hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()[:16] for row in rows_RL]
        line = {"step": STEP[0], "rank": RANK, "data_rank": self.mesh.data_rank, "rows": rows}
        with Path(DETAILS["file"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "step", step))


FAULTS = {f.__name__: f for f in (reset, crash, hang, memory, not_a_number, flip, slow, late, clock, sync_error, rows)}

if DETAILS and "headrace.training.on_rank" in sys.orig_argv:
    FAULTS[DETAILS["fault"]]()
    After("headrace.pipeline.engine", counting_steps)
elif DETAILS and "headrace.stages.pretrain" in sys.orig_argv and DETAILS["fault"] in ("clock", "rows"):
    FAULTS[DETAILS["fault"]]()  # a clock is wrong for all processes of a machine; a layout of one has no other process
    After("headrace.pipeline.engine", counting_steps)
