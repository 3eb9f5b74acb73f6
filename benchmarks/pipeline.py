"""The pipeline engine beside `torch.distributed.pipelining`, and the simulator beside what it simulates, in one run.

Real ranks: two gloo processes, a core and a thread each, train the same V3-shaped model (a dense layer, seven with
experts, FP32, MTP off) with every schedule: ours, and torch's own runtime on the same modules, rows and loss
(`pipeline_real.py`). Contestants take turns, in another order each round, and must agree on loss and gradient norm. A
step is forward and backward, from a barrier to the last rank's end. `idle` is the share of it, up to the last action,
in which a rank computes no microbatch; `after` is what comes then: the sum of DualPipe's two copies, the all-reduce of
the losses. Ours is also beside the simulator, given the mean duration of each kind of action on each stage.

Sleeping ranks: 4 and 8 processes run the same executor with layers that sleep (`pipeline_asleep.py`), without and with
an all-to-all whose two ways take as long as the layer's forward: medians of three. The simulator gets the same times.

Nothing here is a GPU's time. Two cores cannot show throughput, and waking 8 processes on them costs a few per cent.
Timing needs a quiet machine: above a load average of 0.7 the benchmark refuses, and exits 2.

    python benchmarks/pipeline.py            about nine minutes on two cores
    python benchmarks/pipeline.py --quick    small sizes, to see that it runs: its figures mean nothing
    python benchmarks/pipeline.py --anyway   on a busy machine
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headrace.pipeline.generators import generate
from headrace.pipeline.measured import mean_costs
from headrace.pipeline.simulate import Simulation, simulate
from headrace.pipeline.timeline import Span

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
from pipeline_asleep import Sleeps  # noqa: E402
from pipeline_real import OURS, TORCH  # noqa: E402
from ranks import run_ranks  # noqa: E402

QUIET = 0.7
AIMS = {"step beside torch's best": 1.0, "simulator, real ranks": 0.10, "simulator, sleeping ranks": 0.06}
Row = dict[str, Any]


def main() -> int:
    arguments = parse()
    load_before = os.getloadavg()[0]
    if load_before > QUIET and not arguments.anyway:
        print(f"load average {load_before:.2f}: not quiet enough to time anything (at most {QUIET}); wait, or --anyway")
        return 2
    if len(os.sched_getaffinity(0)) < 2:
        print("this benchmark gives each of two processes a core of its own, and there is only one")
        return 2
    print(f"torch {torch.__version__}, load average before the run {load_before:.2f}")
    real = real_rows(arguments)
    load_between = os.getloadavg()[0]
    asleep = [row for ranks in (4, 8) for row in asleep_rows(ranks, arguments)]
    print_asleep(asleep)
    summary = {
        "benchmark": "pipeline", "quick": arguments.quick, "load_before": load_before, "load_between": load_between,
        "real": real, "best": best(real), "asleep": asleep, "aims": AIMS,
    }  # fmt: skip
    print(json.dumps(summary))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps per contestant")
    parser.add_argument("--tokens", type=int, default=128, help="of a microbatch")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--turns", type=int, default=3, help="of sleeping ranks; the median is taken")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--anyway", action="store_true", help="also on a busy machine")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.tokens, arguments.turns = 2, 32, 1
    return arguments


def real_rows(arguments: argparse.Namespace) -> list[Row]:
    """One row for each contestant; refuses to report where they do not compute the same."""
    given = {name: getattr(arguments, name) for name in ("tokens", "microbatches", "rounds", "quick")}
    ranks = run_ranks(2, str(HERE / "pipeline_real.py"), "measure", seconds=900, **given)
    transfer = statistics.median(said["transfer"] for said in ranks)
    print(f"a hidden state takes {transfer * 1e3:.2f} ms from rank to rank")
    rows = []
    for name in [*(f"ours {schedule}" for schedule in OURS), *(f"torch {schedule}" for schedule in TORCH)]:
        said = [rank["contestants"][name] for rank in ranks]
        steps = list(zip(*(one["steps"] for one in said), strict=True))
        row = {"name": name, "norm": said[0]["norm"], **step_figures(steps)}
        if name.startswith("ours"):
            plan = simulated(name.split()[1], arguments.microbatches, steps)
            row |= {"simulated": plan.makespan, "off": plan.makespan / row["window"] - 1}
        rows.append(row)
    for key in ("loss", "norm"):
        values = [row[key] for row in rows]
        assert max(values) / min(values) - 1 < 1e-5, f"the contestants disagree on the {key}: {values}"
    print_real(rows)
    return rows


def step_figures(steps: Sequence[Sequence[dict[str, Any]]]) -> Row:
    """Medians over steps, in seconds."""
    whole, window, idle = [], [], []
    for ranks in steps:
        begun = min(rank["begun"] for rank in ranks)
        whole.append(max(rank["ended"] for rank in ranks) - begun)
        window.append(max(rank["computed"] for rank in ranks) - begun)
        idle.append(1 - sum(rank["busy"] for rank in ranks) / len(ranks) / window[-1])
    return {
        "seconds": statistics.median(whole), "fastest": min(whole), "slowest": max(whole),
        "window": statistics.median(window), "idle": statistics.median(idle),
        "after": statistics.median(a - b for a, b in zip(whole, window, strict=True)),
        "loss": next(rank["loss"] for rank in steps[0] if rank["loss"] is not None),
    }  # fmt: skip


def simulated(schedule: str, microbatches: int, steps: Sequence[Sequence[dict[str, Any]]]) -> Simulation:
    """The schedule with the mean duration of each kind of action on each stage."""
    plan = generate(schedule, 2, microbatches)
    spans = [Span(**span) for ranks in steps for rank in ranks for span in rank["spans"]]
    return simulate(plan, mean_costs(spans, plan.stages))


def best(rows: Sequence[Row]) -> Row:
    """Our fastest schedule beside torch's fastest, and every pair of one name."""
    seconds = {row["name"]: row["seconds"] for row in rows}
    ours, torchs = (
        min((n for n in seconds if n.startswith(who)), key=seconds.__getitem__) for who in ("ours", "torch")
    )
    same = {name: seconds[f"ours {name}"] / seconds[f"torch {name}"] for name in TORCH}
    return {"ours": ours, "torch": torchs, "ratio": seconds[ours] / seconds[torchs], "same": same}


def print_real(rows: Sequence[Row]) -> None:
    head = ("step, ms", "fastest", "slowest", "idle", "after, ms", "beside torch's best", "simulated, ms", "off")
    print(f"\n{'two real ranks':18}" + "".join(f"{words:>{max(10, len(words) + 2)}}" for words in head))
    peer = min(row["seconds"] for row in rows if row["name"].startswith("torch"))
    for row in rows:
        line = f"{row['name']:18}{row['seconds'] * 1e3:10.1f}{row['fastest'] * 1e3:10.1f}{row['slowest'] * 1e3:10.1f}"
        line += f"{row['idle']:10.1%}{row['after'] * 1e3:11.1f}{row['seconds'] / peer:21.3f}"
        print(line + (f"{row['simulated'] * 1e3:15.1f}{row['off']:+10.1%}" if "off" in row else ""))
    found = best(rows)
    print(f"{found['ours']} / {found['torch']}: {found['ratio']:.3f}; same schedule: {found['same']}")


def asleep_rows(ranks: int, arguments: argparse.Namespace) -> list[Row]:
    """One row for each schedule, without and with a delayed all-to-all. All have the same work per rank."""
    layer = 0.004 if arguments.quick else 0.05
    cases: list[Row] = [
        {"schedule": name, "microbatches": 2 * ranks, "layer": layer, "delay": delay}
        | {"layers": 1 if name in ("zb_v", "dualpipe_v") else 2}
        for delay in (0.0, layer / 2)
        for name in OURS
    ]
    given = {"cases": cases, "turns": arguments.turns}
    said = run_ranks(ranks, str(HERE / "pipeline_asleep.py"), "measure", seconds=1200, **given)
    rows = []
    for case, turns in zip(cases, zip(*said, strict=True), strict=True):
        sleeps = Sleeps(case["layer"], case["layers"], case["delay"])
        plan = simulate(generate(case["schedule"], ranks, case["microbatches"]), sleeps.costs())
        slept = []
        for parts in zip(*turns, strict=True):
            makespan = max(part["makespan"] for part in parts)
            slept.append((makespan, 1 - sum(part["busy"] for part in parts) / ranks / makespan))
        seconds, idle = sorted(slept)[len(slept) // 2]
        planned = sum(plan.idle) / ranks / plan.makespan
        figures = {"seconds": seconds, "idle": idle, "simulated": plan.makespan, "simulated_idle": planned}
        rows.append({"ranks": ranks, **case, **figures, "off": plan.makespan / seconds - 1})
    return rows


def print_asleep(rows: Sequence[Row]) -> None:
    print(f"\n{'sleeping ranks':32}{'slept, ms':>12}{'simulated':>12}{'off':>8}{'idle':>8}{'simulated':>12}")
    for row in rows:
        name = f"{row['ranks']} ranks, {row['schedule']}{', all-to-all' if row['delay'] else ''}"
        times = f"{row['seconds'] * 1e3:12.0f}{row['simulated'] * 1e3:12.0f}{row['off']:+8.1%}"
        print(f"{name:32}{times}{row['idle']:8.1%}{row['simulated_idle']:12.1%}")
    print(f"largest error {max(abs(row['off']) for row in rows):.1%}\n")


if __name__ == "__main__":
    sys.exit(main())
