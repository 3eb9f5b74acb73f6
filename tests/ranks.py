"""Runs a function of a test file on several gloo ranks, each a process of its own, with a hard time limit.

    results = run_ranks(2, "parallel/test_reduction.py", "body", case="tied")

calls body(rank, world, **arguments) on every rank after torch.distributed is up, and returns what the ranks returned
(JSON values, so tensors go through files or `tolist`), in their order. Where a rank fails, or time is up, every rank's
stack is dumped to its log, all are killed, and the logs are in the error.

`gather`, called by such functions, puts together what ranks have only pieces of.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from headrace.parallel.assembly import exchange
from headrace.parallel.mesh import Mesh
from headrace.parallel.shards import Piece

TESTS = Path(__file__).resolve().parent
_START = """
import datetime, faulthandler, importlib.util, json, pathlib, signal, sys
faulthandler.register(signal.SIGUSR1)
import torch, torch.distributed as dist
rank, world, test, function, folder, arguments = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:7]
torch.set_num_threads(1)
store = dist.FileStore(f"{folder}/store", world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
specification = importlib.util.spec_from_file_location("body", test)
module = importlib.util.module_from_spec(specification)
sys.modules["body"] = module
specification.loader.exec_module(module)
result = getattr(module, function)(rank, world, **json.loads(arguments))
pathlib.Path(folder, f"result-{rank}.json").write_text(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
"""


def run_ranks(world: int, test: str, function: str, *, seconds: float = 120, **arguments: Any) -> list[Any]:
    """What `function(rank, world, **arguments)` of the file `test` (below tests/) returned on each rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-c", _START]
        tail = [str(world), str(TESTS / test), function, name, json.dumps(arguments)]
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        logs = [folder / f"log-{rank}" for rank in range(world)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), *tail], env=environment, stdout=logs[rank].open("w"), stderr=subprocess.STDOUT
            )
            for rank in range(world)
        ]
        try:
            _await(processes, time.monotonic() + seconds)
        except (TimeoutError, RuntimeError) as error:
            _dump(processes)
            raise AssertionError(f"{error}\n" + "\n".join(_tail(rank, log) for rank, log in enumerate(logs))) from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]


def _await(processes: list[subprocess.Popen[bytes]], until: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed:
            raise RuntimeError(f"ranks {failed} failed")
        if time.monotonic() > until:
            raise TimeoutError("the ranks took too long")
        time.sleep(0.02)
    if any(process.returncode for process in processes):
        raise RuntimeError("ranks failed")


def _dump(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)


def _tail(rank: int, log: Path) -> str:
    return f"--- rank {rank}\n{log.read_text(errors='replace')[-4000:]}"


@torch.no_grad()
def gather(pieces: Iterable[Piece], mesh: Mesh) -> dict[str, Tensor]:
    """Whole CPU tensors by name on rank 0, nothing on the other ranks; pieces cover every element exactly once."""
    mine = sorted(pieces, key=lambda piece: (piece.name, piece.start))
    cpu = torch.device("cpu")
    said = exchange([[p.name, p.shape, p.start, p.tensor.numel(), str(p.tensor.dtype)] for p in mine], mesh, cpu)
    if mesh.rank:
        for piece in mine:
            distributed.send(piece.tensor.detach().contiguous(), 0)
        return {}
    here = iter(mine)
    result: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    entries = sorted((name, rank, *rest) for rank, entries in enumerate(said) for name, *rest in entries)
    for name, rank, shape, start, size, dtype in entries:
        missing[name] = missing.get(name, prod(shape)) - size
        if name not in result:
            result[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        run = torch.empty(size, dtype=result[name].dtype) if rank else next(here).tensor.detach()
        if rank:
            distributed.recv(run, rank)
        result[name].view(-1)[start : start + size] = run.reshape(-1)
    assert not any(missing.values()), "a tensor has elements that no rank gave, or two"
    return result
