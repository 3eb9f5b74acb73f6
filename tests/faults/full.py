"""200 random kills, every run bitwise equal to an undisturbed one: `make test-faults-full`, about an hour on 2 cores.

What was done is kept below `results/faults` after every run, so that the same command goes on where it was interrupted.
Once all is done, the result is written to `results.json` beside this file, with its date and machine. The last line
printed is that JSON.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.kills import Kill, fought, percentile
from faults.product import EXTENDED, SETTINGS, STEP_TOKENS, Product
from small_corpus import tokenized

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_name("results.json")
STEPS = 150  # before the extension


def main() -> int:
    """Run what is left to do; 0 where no run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "faults")
    given = parser.parse_args()
    folder: Path = given.folder
    data, undisturbed = _prepared(folder)
    done = _done(folder)
    while (count := sum(len(entry["kills"]) for entry in done)) < given.kills:
        done.append(_round(folder, data, undisturbed, given.seed, count, given.kills))
        with (folder / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        kills, differences = done[-1]["kills"], done[-1]["differences"]
        print(f"{count + len(kills)} kills: the run ends {differences or 'bitwise equal'}", flush=True)
    result = _result(done)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if result["runs_that_differ"] else 0


def _prepared(folder: Path) -> tuple[list[str], Product]:
    """The corpus and the undisturbed run, made where they are missing."""
    settings = (*SETTINGS, f"recipe.tokens={STEP_TOKENS * STEPS}")
    texts, results = folder / "corpus" / "texts", folder / "corpus" / "results"
    if not (folder / "undisturbed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "corpus").mkdir(parents=True)
        data = tokenized(folder / "corpus", settings)
        unfinished = folder / "undisturbed.partial"
        unfinished.mkdir()
        stage = Product.fresh(data, unfinished, EXTENDED).run(1200)
        assert stage.code == 0, stage.said
        unfinished.rename(folder / "undisturbed")
    data = [*settings, f"corpus.paths=[{texts}]", f"paths.results={results}"]
    return data, Product.of(data, folder / "undisturbed", EXTENDED)


def _round(folder: Path, data: list[str], undisturbed: Product, seed: int, first: int, last: int) -> dict[str, Any]:
    """One run, with as many kills as it has time for."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    # Every second run removes old checkpoints as it goes, so that kills come into that too.
    product = Product.fresh(data, place, EXTENDED, f"checkpoint.keep={2 if first % 2 else 1000}")
    began = time.monotonic()
    fight = fought(product, undisturbed, seed, range(first, last))
    return {
        "kills": [asdict(kill) for kill in fight.kills],
        "reruns": fight.reruns,
        "differences": product.differences(undisturbed),
        "seconds": round(time.monotonic() - began, 1),
    }


def _done(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _result(done: list[dict[str, Any]]) -> dict[str, Any]:
    kills = [Kill(**kill) for entry in done for kill in entry["kills"]]
    recoveries = [kill.recovery for kill in kills if kill.recovery is not None]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "kills": len(kills),
        "runs": len(done),
        "runs_that_differ": sum(bool(entry["differences"]) for entry in done),
        "victims": _counted(kill.victim for kill in kills),
        "moments": _counted(kill.moment for kill in kills),
        "recoveries": len(recoveries),
        "recovery_seconds": {
            "p50": round(percentile(recoveries, 0.5), 2),
            "p95": round(percentile(recoveries, 0.95), 2),
            "max": round(max(recoveries), 2),
        },
        "seconds": round(sum(entry["seconds"] for entry in done)),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def _counted(words: Any) -> dict[str, int]:
    found = list(words)
    return {word: found.count(word) for word in sorted(set(found))}


if __name__ == "__main__":
    sys.exit(main())
