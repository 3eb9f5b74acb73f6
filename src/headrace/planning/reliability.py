"""How often to save, and what share of its time a run can spend on progress: the formulas of Young and others.

Symbols, all in seconds but `machines`:

    M   mean time between faults of the whole job (MTTF): 1 / (machines x faults per machine and second)
    δ   stall: how long training waits for one save
    R   recovery: from a fault until training goes on, replayed steps not counted
    T   interval between two saves

    Young 1974                      T = sqrt(2 δ M)
    optimal availability            T = δ + sqrt(2 (M + R) δ + δ²)          (arXiv 2410.18124)
    effective training time ratio   ETTR = 1 - δ/T - (T/2 + R)/M            (first order in 1/M)

ETTR's terms are the stalls, the steps that a fault loses (half an interval on average), and the recoveries. It is exact
only while T and R are small beside M; where it falls below zero, the job cannot progress.
"""

import math

from headrace.config.schema import ParallelConfig

SECONDS_PER_DAY = 86_400.0


def mean_time_between_faults(machines: float, faults_per_day: float) -> float:
    """M in seconds; `faults_per_day` is the rate of one machine."""
    return SECONDS_PER_DAY / (machines * faults_per_day)


def young(stall: float, mttf: float) -> float:
    """Young's interval between saves, in seconds."""
    return math.sqrt(2 * stall * mttf)


def availability_optimal(stall: float, mttf: float, recovery: float) -> float:
    """The interval of the highest availability, in seconds."""
    return stall + math.sqrt(2 * (mttf + recovery) * stall + stall**2)


def ettr(interval: float, stall: float, mttf: float, recovery: float) -> float:
    """The expected share of time that is progress; 0 where the job cannot progress. All in seconds."""
    return max(0.0, 1 - stall / interval - (interval / 2 + recovery) / mttf)


def auto_interval(step_seconds: float, stall_seconds: float, machines: int, faults_per_day: float) -> int:
    """Steps between two saves by Young's formula, from measured times: `checkpoint.interval=auto`. At least 1."""
    seconds = young(stall_seconds, mean_time_between_faults(machines, faults_per_day))
    return max(1, round(seconds / step_seconds))


def machines_of(parallel: ParallelConfig) -> int:
    """Machines of a layout, with `parallel.node_size` ranks on each."""
    return math.ceil(parallel.pipeline * parallel.data / parallel.node_size)


def expectation(machines: int, faults_per_day: float, stall: float = 2.0, recovery: float = 60.0) -> tuple[str, str]:
    """A row (label, value) of `headrace plan`: faults to expect, Young's interval, and the ETTR that follows.

    `stall` and `recovery` are assumptions before a run has measured them.
    """
    mttf = mean_time_between_faults(machines, faults_per_day)
    interval = young(stall, mttf)
    share = ettr(interval, stall, mttf, recovery)
    progress = f"ETTR {100 * share:.1f} %" if share else "the job cannot progress"
    return (
        "expected faults",
        f"one in {_span(mttf)} on {machines:,} machine{'s' if machines > 1 else ''}: a save every {_span(interval)}, "
        f"{progress} (assumed: {stall:g} s stall per save, {recovery:g} s to recover)",
    )


def _span(seconds: float) -> str:
    for unit, name in ((SECONDS_PER_DAY, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
