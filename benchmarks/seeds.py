"""Does the demo model beat its baselines with each of three seeds? `make bench-seeds` (finished runs are taken over).

For each seed the whole DAG up to evaluate, with `seed.init` and `seed.data` set to it. The difference to the bigram
model is paired over held-out documents, with its 95 % interval; the bigram model is estimated on the rows that the
run read.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from headrace.stages.graph import Graph

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)


def evaluated(seed: int, experiment: str) -> dict:
    """Bits per byte of one seed's run, made where it is missing."""
    settings = f"experiment={experiment} seed.init={seed} seed.data={seed}"
    command = [sys.executable, "-m", "snakemake", "evaluate", "--config", f"set={settings}"]
    subprocess.run(command, cwd=ROOT, check=True)
    place = ROOT / Graph({"set": settings}, check_sources=False).places["evaluate"].artifact
    return json.loads((place / "results.json").read_text())["bits_per_byte"]["kinds"]["all"]


def main() -> None:
    """Print a table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="demo")
    experiment = parser.parse_args().experiment
    rows = []
    print(f"{'seed':<6}{'model':>8}{'bigram':>8}{'trigram':>8}{'xz -9':>8}  model - bigram")
    for seed in SEEDS:
        found = evaluated(seed, experiment)
        models = {name: entry["value"] for name, entry in found["models"].items()}
        paired = found["paired"]["bigram"]
        print(
            f"{seed:<6}" + "".join(f"{models[name]:>8.3f}" for name in ("model", "bigram", "trigram", "xz -9")),
            f" {paired['value']:+.3f} [{paired['low']:+.3f}, {paired['high']:+.3f}]",
        )
        ratio = models["model"] / models["bigram"]
        rows.append({"seed": seed, "ours": models["model"], "peer": models["bigram"], "ratio": ratio, "paired": paired})
    print(json.dumps({"benchmark": "seeds", "unit": "bits per byte", "rows": rows}))


if __name__ == "__main__":
    main()
