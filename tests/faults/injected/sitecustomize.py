"""Faults that only the inside of a rank can do to itself. Python imports this where its folder lies on PYTHONPATH.

`INJECTED_FAULT` is a JSON list of {"fault": one of `FAULTS`, ...its own details}; "once" is a file whose existence
says that it has happened. The product knows nothing of this: modules are changed as they are imported, and only in
ranks. What is changed are names of the product's interior, so a fault that can no longer be placed fails the rank that
should have it.
"""

import importlib.abc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Details = dict[str, Any]
INJECTED: list[Details] = json.loads(os.environ.get("INJECTED_FAULT", "[]"))
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
        found = importlib.util.find_spec(name)  # by the next of these, where two change one module
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


def now(details: Details, step: int | None = None, name: str = "") -> bool:
    """Whether it is this rank's turn, in the step of the details or in `step`; with "once", the first time only."""
    if details["rank"] != RANK or STEP[0] != (step or details["step"]):
        return False
    if "once" in details:
        happened = Path(details["once"] + name)
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


def reset(details: Details) -> None:
    """Cut all connections to other ranks, for both sides, before an action; "at" is the step for each kind of them."""

    def change(kind: str) -> None:
        if kind in details["at"] and now(details, details["at"][kind], f".{kind}"):
            cut()

    on_action(change)


def cut() -> None:
    """Have the kernel reset this process's connections to other ranks."""
    for here, there in connections():
        subprocess.run(["ss", "-K", "sport", "=", here, "dport", "=", there], capture_output=True, check=True)


def connections() -> list[tuple[str, str]]:
    """Ports of this process's connections to other ranks: those of gloo, not that to the parent."""
    parent, found = str(json.loads(os.environ["HEADRACE_RANKS"])["port"]), []
    said = subprocess.run(["ss", "-tnpH", "state", "established"], capture_output=True, text=True, check=True).stdout
    for line in said.splitlines():
        if f"pid={os.getpid()}," in line:
            here, there = (end.rpartition(":")[2] for end in line.split()[2:4])
            if parent not in (here, there):
                found.append((here, there))
    return found


def partition(details: Details) -> None:
    """From an action on nothing arrives any more on the connections to other ranks, in a network of the test's own."""

    def change(kind: str) -> None:
        if kind == details["kind"] and now(details):
            found = connections()
            assert found, "it has no connections to other ranks"
            rules = ["add pref 100 lookup local", "delete pref 0"]
            for port in {port for pair in found for port in pair}:
                rules += [f"add pref 10 ipproto tcp {end} {port} blackhole" for end in ("sport", "dport")]
            for rule in rules:
                subprocess.run(["ip", "rule", *rule.split()], capture_output=True, check=True)

    on_action(change)


def crash(details: Details) -> None:
    """An exception in a step, however often it is tried."""

    def change(kind: str) -> None:
        if now(details):
            raise ArithmeticError("this step cannot be computed")

    on_action(change)


def kill(details: Details) -> None:
    """SIGKILL as an activity begins, of each kind once; "at" are regular expressions of their labels, "once" a folder.

    The file of a kind then holds the moment, in seconds since 1970.
    """

    def mark(old: Callable[..., Any], self: Any, label: str, mood: Any) -> None:
        old(self, label, mood)
        for number, wanted in enumerate(details["at"]):
            happened = Path(details["once"], str(number))
            if details["rank"] == RANK and re.fullmatch(wanted, label) and not happened.exists():
                happened.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)

    After("headrace.launch.heartbeat", lambda module: wrap(module.Heartbeat, "mark", mark))


def shape(details: Details) -> None:
    """The rows of one rank are a token shorter than those of the step."""

    def step(old: Callable[..., Any], self: Any, rows_RL: Any, *given: Any, **named: Any) -> Any:
        return old(self, rows_RL[:, :-1] if now(details) else rows_RL, *given, **named)

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "step", step))


def hang(details: Details) -> None:
    """A computation that never ends."""

    def doing(old: Callable[..., Any], self: Any, action: str) -> None:
        old(self, action)
        if now(details):
            time.sleep(1e6)

    After("headrace.pipeline.execute", lambda module: wrap(module._Execution, "_doing", doing))


def memory(details: Details) -> None:
    """A computation that needs more memory than the rank may have: the kernel ends the process."""

    def change(kind: str) -> None:
        if now(details):
            (Path(details["group"]) / "cgroup.procs").write_text(str(os.getpid()))
            bytearray(64 << 20)[::4096] = b"\1" * (64 << 20 >> 12)

    on_action(change)


def not_a_number(details: Details) -> None:
    """One element of one gradient on one rank is NaN or Inf; "at" is the value by step."""

    def step(old: Callable[..., Any], self: Any, *given: Any, **named: Any) -> Any:
        losses = old(self, *given, **named)
        for at, value in details["at"].items():
            if now(details, int(at), f".{at}"):
                piece = next(piece for piece in self.reduction.pieces if ".mlp.experts." in piece.name)
                piece.tensor.grad.view(-1)[3] = float(value)
        return losses

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "step", step))


def spike(details: Details) -> None:
    """The loss of one rank's microbatches is ten times what it is, in one step, before ranks add up theirs."""

    def losses(old: Callable[..., Any], self: Any, results: Any) -> Any:
        if now(details):
            results.losses["main"] *= 10
        return old(self, results)

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "_losses", losses))


PIECES: dict[str, Any] = {}


def flip(details: Details) -> None:
    """One bit on one rank changes behind everybody's back; "at" is the step of each, by what it is a bit of:

    a weight, a copy of one that another rank owns, or a moment, before the step; a copy that has just arrived; within
    a computation the output of experts, or a weight's gradient. The file "once.<what>" then says where it was.
    """

    def strike(what: str, where: str, tensor: Any) -> None:
        if what in details["at"] and now(details, details["at"][what], f".{what}"):
            import torch

            tensor.data.view(-1).view(torch.int16)[5] ^= 1 << 6
            Path(f"{details['once']}.{what}").write_text(where)

    def copy_of(reduction: Any) -> Any:
        owned = {piece.name for piece in reduction.pieces}
        return next(piece for group in reduction.replicas for piece in group if piece.name not in owned)

    def step(old: Callable[..., Any], self: Any, *given: Any, **named: Any) -> Any:
        for what, piece in {**PIECES, "copy": copy_of(self.reduction)}.items():
            strike(what, piece.name, piece.tensor)
        return old(self, *given, **named)

    def made(old: Callable[..., Any], self: Any, pieces: list[Any], *given: Any, **named: Any) -> None:
        old(self, pieces, *given, **named)
        PIECES.update(weight=pieces[0], moment=self.moments()[0])

    def share(old: Callable[..., Any], self: Any) -> None:
        old(self)
        piece = copy_of(self)
        strike("arrived", piece.name, piece.tensor)

    def experts(old: Callable[..., Any], self: Any, *given: Any) -> Any:
        rows = old(self, *given)
        strike("activation", "experts", rows)
        return rows

    def gradients(old: Callable[..., Any], self: Any, action: Any) -> Any:
        found = old(self, action)
        if found:
            strike("gradient", str(action), found[0])
        return found

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "step", step))
    After("headrace.training.optimizer", lambda module: wrap(module.Optimizer, "__init__", made))
    After("headrace.parallel.reduction", lambda module: wrap(module.GradientReduction, "share", share))
    After("headrace.model.experts", lambda module: wrap(module.Experts, "forward", experts))
    After("headrace.pipeline.execute", lambda module: wrap(module._Execution, "_weight_gradients", gradients))


def slow(details: Details) -> None:
    """From a step on, every computation of one rank takes half as long again, from when what it needs is there."""
    began = [0.0]

    def doing(old: Callable[..., Any], self: Any, action: str) -> None:
        old(self, action)
        began[0] = time.monotonic()

    def compute(old: Callable[..., Any], self: Any, action: Any) -> None:
        old(self, action)
        if details["rank"] == RANK and STEP[0] >= details["from_step"]:
            time.sleep(0.5 * (time.monotonic() - began[0]))

    def change(module: Any) -> None:
        wrap(module._Execution, "_doing", doing)
        wrap(module._Execution, "_compute", compute)

    After("headrace.pipeline.execute", change)


def late(details: Details) -> None:
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


def clock(details: Details) -> None:
    """The wall clock is off by so many seconds; the monotonic one goes on."""
    true = time.time
    time.time = lambda: true() + details["seconds"]


def sync_error(details: Details) -> None:
    """So many fsyncs of what is saved fail with EIO, for each of some steps."""
    true, left = os.fsync, details["times"]

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        for step in left:
            if left[step] and details["rank"] == RANK and f"/.unfinished-{step}-" in path:
                left[step] -= 1
                raise OSError(5, "Input/output error")
        true(descriptor)

    os.fsync = fsync


def rows(details: Details) -> None:
    """Nothing bad: every rank writes down which rows it reads for which step."""

    def step(old: Callable[..., Any], self: Any, rows_RL: Any, *given: Any, **named: Any) -> Any:
        result = old(self, rows_RL, *given, **named)
        import hashlib

        rows = [hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()[:16] for row in rows_RL]
        line = {"step": STEP[0], "rank": RANK, "data_rank": self.mesh.data_rank, "rows": rows}
        with Path(details["file"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    After("headrace.pipeline.engine", lambda module: wrap(module.Engine, "step", step))


FAULTS = {
    fault.__name__: fault
    for fault in (
        reset, partition, crash, kill, shape, hang, memory, not_a_number, spike, flip, slow, late, clock, sync_error,
        rows,
    )
}  # fmt: skip

if INJECTED and "headrace.training.on_rank" in sys.orig_argv:
    for injected in INJECTED:
        FAULTS[injected["fault"]](injected)
    After("headrace.pipeline.engine", counting_steps)
elif INJECTED and "headrace.stages.pretrain" in sys.orig_argv:
    # A clock is wrong for all processes of a machine; a layout of one has no other process.
    for injected in INJECTED:
        if injected["fault"] in ("clock", "rows"):
            FAULTS[injected["fault"]](injected)
            After("headrace.pipeline.engine", counting_steps)
