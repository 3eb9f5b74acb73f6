"""How much of its time does a run train that is hit by random faults, and what does the formula allow? `make soak`

Pretrain through its door, FP8 and DualPipe on 2 ranks, is hit by SIGKILL of a rank, SIGKILL of the stage's process (run
again at once) and SIGTERM (pre-emption: saved, run again at once), at exponentially distributed distances, scaled so
that their mean is `--distance` recoveries, as measured here before with one fault of each kind. The same run without
faults is done too, and both must end bitwise equal.

    ETTR       seconds of steps that lead to the final weights / all seconds, from the run's ledger. Seconds in which no
               process of the stage was there are counted from outside, and so is the time after a kill that the ledger
               of the killed process does not know of
    limit      planning.reliability.ettr of the measured interval between saves, stall, recovery and distance of faults

Starting the first time and writing the results at the end are in neither. The last line printed is one JSON object.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faults.kills import check_nothing_is_left
from faults.product import SETTINGS, STEP_TOKENS, Product, Stage, steps, wait_for
from headrace.planning.reliability import ettr, young
from headrace.tracking.journal import read_lines
from headrace.training.ledger import figures, read
from small_corpus import tokenized

FAULTS = ("rank 0 killed", "rank 1 killed", "stage killed", "stage told to stop")
MARGIN = 8.0
"""Seconds of training behind the last fault."""


@dataclass(frozen=True)
class Hit:
    """One fault, and the seconds from it until the run trained again."""

    fault: str
    at: float
    recovery: float


def main() -> int:
    """Print a table, and one JSON object as the last line; 0 where both runs end equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=6, help="how many faults")
    parser.add_argument("--distance", type=float, default=25, help="mean distance of faults, in measured recoveries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs lie; a temporary folder by default")
    given = parser.parse_args()
    assert given.distance >= 20, "closer together, faults hit recoveries, and the formula means nothing"
    with tempfile.TemporaryDirectory(prefix="headrace-soak-") as name:
        result = soak(given.folder or Path(name), given.faults, given.distance, given.seed)
    for key, value in result.items():
        print(f"{key:<28}{value}")
    print(json.dumps(result))
    return 0 if result["bitwise_equal"] else 1


def soak(folder: Path, faults: int, distance: float, seed: int) -> dict[str, Any]:
    """Measure a recovery, then run with and without faults."""
    data = tokenized(folder, (*SETTINGS, f"recipe.tokens={STEP_TOKENS * 150}"))
    recovery, step_seconds, stall = rehearsal(data, folder / "rehearsal")
    mttf = distance * recovery
    chance = random.Random(seed)
    drawn = [chance.expovariate(1) for _ in range(faults)]
    distances = [max(one * mttf / mean(drawn), MARGIN) for one in drawn]
    interval = max(1, round(young(stall, mttf) / step_seconds))
    count = round((sum(distances) + MARGIN) / step_seconds)
    print(
        f"a recovery takes {recovery:.1f} s, a step {step_seconds:.3f} s; {count} steps, a save every {interval}",
        flush=True,
    )
    settings = (
        f"recipe.tokens={STEP_TOKENS * count}", f"checkpoint.interval={interval}", f"train.validate_every={count}",
        "checkpoint.keep=3",
    )  # fmt: skip
    disturbed, undisturbed = (fresh(data, folder / name, settings) for name in ("disturbed", "undisturbed"))
    hits, began = hit(disturbed, [(distance, chance.choice(FAULTS)) for distance in distances])
    assert undisturbed.run(3600 * 6).code == 0
    return report(disturbed, undisturbed, hits, began, mttf)


def rehearsal(data: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Seconds of a recovery, in the mean over one fault of each kind, of a step, and of the stall of a save."""
    product = fresh(data, folder, ())
    hits, _ = hit(product, [(4.0, fault) for fault in FAULTS])
    assert len(hits) == len(FAULTS), "the rehearsal was over before all faults had come"
    rows = [row["time"] for _, row in read_lines(product.folder / "tracking" / "metrics.jsonl") if "loss" in row]
    apart = sorted(after - before for before, after in pairwise(rows))
    stalls = [event["stall"] for event in product.events("save")]
    return mean(found.recovery for found in hits), apart[len(apart) // 2], mean(stalls)


def fresh(data: Sequence[str], folder: Path, settings: Sequence[str]) -> Product:
    """A run of its own."""
    folder.mkdir()
    return Product.fresh(data, folder, *settings)


def hit(product: Product, faults: Sequence[tuple[float, str]]) -> tuple[list[Hit], float]:
    """Run to the end, with faults after these spans of training; also when training began."""
    stage = product.start()
    began = stage.until_trained(0.0, seconds=300)
    hits: list[Hit] = []
    for distance, fault in faults:
        time.sleep(distance)
        if stage.code is not None:
            break
        at, stage = strike(product, stage, fault)
        hits.append(Hit(fault, at, stage.until_trained(at + 0.5, seconds=300) - at))
        print(f"{fault}: {hits[-1].recovery:.1f} s", flush=True)
    assert stage.wait(3600 * 6) == 0, stage.said
    check_nothing_is_left(product)
    return hits, began


def strike(product: Product, stage: Stage, fault: str) -> tuple[float, Stage]:
    """One fault; when, and the process of the stage that goes on."""
    if fault == "stage told to stop":
        at = time.time()
        stage.process.send_signal(signal.SIGTERM)
        assert stage.wait(60) == 75, stage.said
        return at, product.start()
    if fault == "stage killed":
        return stage.kill(None), product.start()
    before = set(stage.both_ranks().values())
    at = stage.kill(int(fault.split()[1]))
    wait_for(lambda: True if set(stage.ranks().values()).isdisjoint(before) else None, 60, stage)
    return at, stage


def report(disturbed: Product, undisturbed: Product, hits: list[Hit], began: float, mttf: float) -> dict[str, Any]:
    """What came of it."""
    entries = read(disturbed.folder / "ledger.jsonl")
    found = figures(entries)
    ended = max(entry["time"] for entry in entries if entry["event"] == "published")
    stalls = [entry["stall"] for entry in entries if entry["event"] == "save"]
    wall, saved = ended - began, steps(undisturbed.checkpoints)
    interval = wall * found["ettr"] / max(1, len(stalls)) if stalls else wall
    recovery = mean(found.recovery for found in hits)
    between = wall / len(hits)
    share, limit = found["productive_seconds"] / wall, ettr(interval, mean(stalls), between, recovery)
    differences = disturbed.differences(undisturbed)
    return {
        "faults": len(hits),
        "by_fault": {name: sum(found.fault == name for found in hits) for name in FAULTS},
        "mean_distance_s": round(between, 1),
        "distance_in_recoveries": round(between / recovery, 1),
        "recovery_s": {"mean": round(recovery, 2), "max": round(max(found.recovery for found in hits), 2)},
        "steps": max(saved),
        "wall_s": round(wall, 1),
        "ettr": round(share, 4),
        "ettr_limit": round(limit, 4),
        "share_of_limit": round(share / limit, 4),
        "ettr_of_ledger": round(found["ettr"], 4),
        "goodput": round(found["goodput"], 4),
        "mttr_of_ledger": found["mttr"],
        "saves": len(stalls),
        "stall_s": round(mean(stalls), 4),
        "bitwise_equal": differences == [],
        "differences": differences[:5],
    }


if __name__ == "__main__":
    sys.exit(main())
