"""Saving and loading a training state, beside torch.distributed.checkpoint and a plain copy: `make bench-checkpoint`.

The state is a model's: FP32 weights and two BF16 moments, 8 bytes a parameter. In turns, each several times, and on the
same disk: ours (as the trainer saves: copy, write, read back, fsync, verify, publish), torch.distributed.checkpoint
(DCP) synchronous and asynchronous with its default planner and its fsync, and the same bytes written and fsynced
without anything else. Loading fills tensors that are there already, from the page cache and from the disk; ours
verifies every byte, DCP and the plain read verify none. What that is worth is counted: single bits are flipped in small
checkpoints of ours, of DCP and in a safetensors file, and those are counted that a load notices.

The stall is what training waits for. What one save costs in all, `slowed`, is measured too: matrix products that take
longer while a save is being written. Both are given as a share of training time at Young's interval (planning/
reliability.py, at the rate of faults of Meta's RSC-1).

    python benchmarks/checkpoint.py            about 4 minutes, 1.2 GB
    python benchmarks/checkpoint.py --quick    a tenth of the state, half a minute
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException

from headrace.artifacts.files import write_all
from headrace.checkpoint.reader import open_checkpoint
from headrace.checkpoint.slices import as_bytes
from headrace.checkpoint.writer import Writer, publish
from headrace.parallel.assembly import fill
from headrace.parallel.shards import pieces_of
from headrace.planning.reliability import mean_time_between_faults, young

FLIPS = 300
FAULTS_PER_DAY = 0.0065
MACHINES = (1, 256, 2048)  # of 8 GPUs
AIM = 0.035
State = dict[str, dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        distributed.init_process_group("gloo", store=distributed.FileStore(f"{name}/store", 1), rank=0, world_size=1)
        state = make_state(2 if arguments.quick else 24)
        size = sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())
        print(f"{size / 1e9:.2f} GB in {sum(map(len, state.values()))} tensors; load average before: {load:.2f}")
        saves = measure_saves(folder, state, arguments.repeats)
        print_saves(size, saves)
        loads = measure_loads(folder, state, arguments.repeats)
        print_loads(size, loads)
        cost = measure_slowing(folder, state, arguments.repeats)
        noticed = count_noticed(folder)
        distributed.destroy_process_group()
    summary = {
        "benchmark": "checkpoint", "quick": arguments.quick, "load_before": load, "bytes": size,
        "save": {way: {key: round(value, 4) for key, value in row.items()} for way, row in saves.items()},
        "load": {way: {key: round(value, 4) for key, value in row.items()} for way, row in loads.items()},
        **judged(saves, loads, cost), "noticed": noticed, "aims": {"stall_share": AIM, "save": 1.0, "load": 1.0},
    }  # fmt: skip
    print_summary(summary)
    print(json.dumps(summary))


def make_state(layers: int) -> State:
    """Weights and moments of a small mixture of experts, all values random."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (8192, 1024), "lm_head.weight": (8192, 1024)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (1024,),
            f"model.layers.{layer}.self_attn.o_proj.weight": (1024, 1024),
            f"model.layers.{layer}.mlp.experts.gate_proj.weight": (8, 256, 1024),
            f"model.layers.{layer}.mlp.experts.down_proj.weight": (8, 1024, 256),
        }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    moments = {
        f"{name}/{moment}": tensor.to(torch.bfloat16) for name, tensor in weights.items() for moment in ("m", "v")
    }
    return {"model": weights, "optimizer": moments}


def measure_saves(folder: Path, state: State, repeats: int) -> dict[str, dict[str, float]]:
    """Medians in seconds by way: until training may go on (`stall`), until the state is on the disk (`whole`)."""
    writer = Writer(folder / "ours", 0)
    ways: dict[str, Callable[[int], tuple[float, float]]] = {
        "plain copy": lambda number: both(lambda: copy_plainly(folder / f"plain-{number}", state)),
        "ours": lambda number: save_ours(writer, folder / "ours", number, state),
        "DCP": lambda number: both(lambda: dcp.save(flat(state), checkpoint_id=folder / f"dcp-{number}")),
        "DCP async": lambda number: save_async(folder / f"async-{number}", state),
    }
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(repeats + 1):
        for way, act in ways.items():
            taken[way].append(act(number))
            clear(folder)
    return {
        way: {
            "first_stall": rows[0][0],
            "stall": statistics.median(stall for stall, _ in rows[1:]),
            "whole": statistics.median(whole for _, whole in rows[1:]),
        }
        for way, rows in taken.items()
    }


def save_ours(writer: Writer, folder: Path, number: int, state: State) -> tuple[float, float]:
    """As the trainer does on one rank."""
    started = time.perf_counter()
    writer.begin(number, "bench", {kind: pieces_of(tensors.items()) for kind, tensors in state.items()})
    stall = time.perf_counter() - started
    writer.wait()
    publish(folder, number, "bench", [writer.take().files], {"step": number})
    return stall, time.perf_counter() - started


def save_async(path: Path, state: State) -> tuple[float, float]:
    """DCP's asynchronous save."""
    started = time.perf_counter()
    future = dcp.async_save(flat(state), checkpoint_id=path)
    stall = time.perf_counter() - started
    future.result()
    return stall, time.perf_counter() - started


def copy_plainly(path: Path, state: State) -> None:
    """The state's bytes as they are, one file per kind."""
    path.mkdir()
    for kind, tensors in state.items():
        descriptor = os.open(path / kind, os.O_WRONLY | os.O_CREAT)
        for tensor in tensors.values():
            write_all(descriptor, as_bytes(tensor))
        os.fsync(descriptor)
        os.close(descriptor)


def measure_loads(folder: Path, state: State, repeats: int) -> dict[str, dict[str, float]]:
    """Medians in seconds by way: with everything in the page cache (`cached`), and with nothing (`disk`)."""
    save_ours(Writer(folder / "ours", 0), folder / "ours", 1, state)
    dcp.save(flat(state), checkpoint_id=folder / "dcp")
    copy_plainly(folder / "plain", state)
    target = {kind: {name: torch.zeros_like(t) for name, t in tensors.items()} for kind, tensors in state.items()}
    ways: dict[str, Callable[[], None]] = {
        "plain read": lambda: read_plainly(folder / "plain", target),
        "ours": lambda: load_ours(folder / "ours" / "step-00000001", target),
        "DCP": lambda: dcp.load(flat(target), checkpoint_id=folder / "dcp"),
    }
    taken: dict[str, dict[str, list[float]]] = {way: {"cached": [], "disk": []} for way in ways}
    for _ in range(repeats):
        for way, act in ways.items():
            act()
            taken[way]["cached"].append(both(act)[0])
            forget(folder)
            for tensors in target.values():
                for tensor in tensors.values():
                    tensor.zero_()
            taken[way]["disk"].append(both(act)[0])
            for kind, tensors in state.items():
                assert all(torch.equal(target[kind][name], tensor) for name, tensor in tensors.items()), way
    clear(folder)
    return {way: {key: statistics.median(values) for key, values in row.items()} for way, row in taken.items()}


def load_ours(path: Path, target: State) -> None:
    """As a resume does."""
    found = open_checkpoint(path)
    for kind, tensors in target.items():
        fill(pieces_of(tensors.items()), set(tensors), found.tensors(kind))


def read_plainly(path: Path, target: State) -> None:
    """The same bytes into the same tensors, believed."""
    for kind, tensors in target.items():
        with (path / kind).open("rb", buffering=0) as file:
            for tensor in tensors.values():
                into = as_bytes(tensor)
                while into:
                    into = into[file.readinto(into) :]


def measure_slowing(folder: Path, state: State, repeats: int) -> dict[str, float]:
    """Seconds that steps of matrix products take longer because a save is written beside them, and a step's seconds."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)

    def step() -> float:
        started = time.perf_counter()
        for _ in range(4):
            left @ right
        return time.perf_counter() - started

    writer, lost, alone_all = Writer(folder / "ours", 0), [], []
    for number in range(1, repeats + 2):
        alone = statistics.median(step() for _ in range(15))
        writer.begin(number, "bench", {kind: pieces_of(tensors.items()) for kind, tensors in state.items()})
        beside = []
        while writer.status().state == "writing":  # type: ignore[union-attr]
            beside.append(step())
        writer.wait()
        publish(folder / "ours", number, "bench", [writer.take().files], {})
        clear(folder)
        if number > 1:
            lost.append(sum(beside) - alone * len(beside))
            alone_all.append(alone)
    return {"slowed": max(0.0, statistics.median(lost)), "step": statistics.median(alone_all)}


def count_noticed(folder: Path) -> dict[str, int]:
    """Of `FLIPS` single-bit flips, spread over all files by size, those at which a load raises an error."""
    generator = torch.Generator().manual_seed(1)
    state = {
        kind: {f"{kind}.{i}": torch.randn(1 << 14, generator=generator) for i in range(4)} for kind in ("model", "ema")
    }
    target = {kind: {name: torch.zeros(1 << 14) for name in tensors} for kind, tensors in state.items()}
    path, theirs, plain = folder / "ours" / "step-00000001", folder / "dcp", folder / "plain"
    save_ours(Writer(folder / "ours", 0), folder / "ours", 1, state)
    dcp.save(flat(state), checkpoint_id=theirs)
    plain.mkdir()
    save_file(flat(state), plain / "x.safetensors")
    ways: dict[str, tuple[Path, Callable[[], object]]] = {
        "ours": (path, lambda: load_ours(path, target)),
        "DCP": (theirs, lambda: dcp.load(flat(target), checkpoint_id=theirs)),
        "safetensors": (plain, lambda: load_file(plain / "x.safetensors")),
    }
    found = {way: sum(notices(*given, random.Random(number)) for number in range(FLIPS)) for way, given in ways.items()}
    clear(folder)
    return found


def notices(folder: Path, load: Callable[[], object], generator: random.Random) -> bool:
    """Flip one bit of a file in `folder`, load, and set it right again."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = generator.choices(files, [file.stat().st_size for file in files])[0]
    sound = path.read_bytes()
    damaged, bit = bytearray(sound), generator.randrange(8 * len(sound))
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        load()
        return False
    except (Exception, CheckpointException):  # DCP's is no Exception
        return True
    finally:
        path.write_bytes(sound)


def judged(
    saves: dict[str, dict[str, float]], loads: dict[str, dict[str, float]], cost: dict[str, float]
) -> dict[str, object]:
    """Shares of training time, and ratios: above 1 where ours is faster."""
    stall, whole = saves["ours"]["stall"], saves["ours"]["whole"]
    shares = {}
    for machines in MACHINES:
        mttf = mean_time_between_faults(machines, FAULTS_PER_DAY)
        shares[machines] = {
            name: seconds / young(seconds, mttf)
            for name, seconds in (("stall", stall), ("all", stall + cost["slowed"]))
        }
    return {
        "slowed": cost["slowed"],
        "share_at_young": shares,
        "ratio": {
            "save beside DCP": saves["DCP"]["whole"] / whole,
            "save beside DCP async": saves["DCP async"]["whole"] / whole,
            "stall beside DCP async": saves["DCP async"]["stall"] / stall,
            "save beside plain copy": saves["plain copy"]["whole"] / whole,
            **{f"load beside {way}, {key}": loads[way][key] / loads["ours"][key]
               for way in ("DCP", "plain read") for key in ("cached", "disk")},
        },
    }  # fmt: skip


def print_saves(size: int, saves: dict[str, dict[str, float]]) -> None:
    """For people."""
    print(f"\n{'save':<14}{'stall s':>9}{'first':>8}{'whole s':>9}{'GB/s':>7}   every byte verified")
    for way, row in saves.items():
        figures = f"{row['stall']:>9.3f}{row['first_stall']:>8.3f}{row['whole']:>9.3f}{size / row['whole'] / 1e9:>7.2f}"
        print(f"{way:<14}{figures}   {'yes' if way == 'ours' else 'no'}", flush=True)


def print_loads(size: int, loads: dict[str, dict[str, float]]) -> None:
    """For people."""
    print(f"\n{'load':<14}{'cached s':>9}{'GB/s':>7}{'disk s':>9}{'GB/s':>7}   every byte verified")
    for way, row in loads.items():
        figures = "".join(f"{row[key]:>9.3f}{size / row[key] / 1e9:>7.2f}" for key in ("cached", "disk"))
        print(f"{way:<14}{figures}   {'yes' if way == 'ours' else 'no'}", flush=True)


def print_summary(summary: dict) -> None:
    """For people."""
    print("\nratios, above 1 where ours is faster")
    for name, ratio in summary["ratio"].items():
        print(f"  {name:<32}{ratio:>6.2f}")
    print(f"\nsingle-bit flips that a load notices, of {FLIPS}: {summary['noticed']}")
    print(f"a save also slows what is computed beside it by {summary['slowed']:.3f} s")
    print(f"share of training time at Young's interval (aim {AIM:.1%})")
    for machines, share in summary["share_at_young"].items():
        print(f"  {machines:>5} machines: stall {share['stall']:.3%}, with what is slowed {share['all']:.3%}")


def flat(state: State) -> dict[str, Tensor]:
    """One dictionary for DCP."""
    return {f"{kind}.{name}": tensor for kind, tensors in state.items() for name, tensor in tensors.items()}


def both(act: Callable[[], object]) -> tuple[float, float]:
    """The seconds of something that training waits for to its end."""
    started = time.perf_counter()
    act()
    seconds = time.perf_counter() - started
    return seconds, seconds


def clear(folder: Path) -> None:
    """Remove what was written, and wait for the disk: nobody pays for the one before."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    os.sync()


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
