"""What Snakemake, Hydra and tracking add: `make bench-overhead` (about twice the demo's time).

Two comparisons in one run. First the whole pipeline by `snakemake`, with W&B offline, beside the same stage bodies, one
after the other in one process: no DAG, no run directories, no tracking, one configuration (the ratio is what a user
pays for all of it together, the start of eight Python processes included). Second `snakemake` with nothing to do beside
`snakemake` on a Snakefile with a single finished rule, in turns.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BARE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from overhead import bare_pipeline
started = time.monotonic()
bare_pipeline(sys.argv[2], sys.argv[3])
print(time.monotonic() - started)
"""
ONE_RULE = "rule all:\n    output:\n        'done',\n    shell:\n        'touch {output}'\n"


class Silent:
    """A tracker that keeps nothing."""

    def log(self, step: int, metrics: object) -> None:
        """Forget it."""


def bare_pipeline(experiment: str, folder: str) -> None:
    """Every stage's body in this process, each artifact a plain folder with a manifest for its children's checks."""
    import importlib

    from headrace.artifacts import manifest as manifests
    from headrace.config.compose import load
    from headrace.corpus.sources import known_lock
    from headrace.launch.deadline import Deadline
    from headrace.stages.places import places
    from headrace.stages.run import Run
    from headrace.stages.table import STAGES

    config = load([f"experiment={experiment}", f"paths.results={folder}"])
    lock = known_lock(config)
    found = places(config, lock.hash)
    for row in STAGES:
        place = found[row.name]
        output = place.folder / "artifact.partial"
        output.mkdir(parents=True)
        door = importlib.import_module(f"headrace.stages.{row.name}").DOOR
        parents = {name: found[name] for name in row.parents}
        log = logging.getLogger("bare")
        run = Run(place, config, lock, "bare", parents, output, Deadline(None), log, Silent())  # type: ignore[arg-type]
        door.body(run)
        manifests.build(output, kind=row.name, producer={}, inputs=run.inputs, summary={}, algorithm=door.algorithm)
        output.rename(place.artifact)
        facts = {"seconds": 0, "finished": "", "made": "", "versions": {}, "machine": {"processor": ""}, "code": CODE}
        (place.folder / "provenance.json").write_text(json.dumps(facts))


CODE = {"commit": None, "dirty": False, "diff": None}


def pipeline_seconds(experiment: str, folder: Path) -> float:
    """The whole pipeline through snakemake."""
    command = [
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--directory",
        str(folder),
        "--config",
        f"experiment={experiment}",
    ]
    return timed([sys.executable, "-m", "snakemake", *command], ROOT)


def bare_seconds(experiment: str, folder: Path) -> float:
    """The same stage bodies without any of it, interpreter start included."""
    return timed([sys.executable, "-c", BARE, str(Path(__file__).parent), experiment, str(folder / "bare")], folder)


def timed(command: list[str], folder: Path) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.monotonic()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return seconds


def noop_seconds(experiment: str, folder: Path, repeats: int) -> tuple[float, float]:
    """Medians of a finished pipeline and a finished one-rule workflow, in turns."""
    small = folder / "one_rule"
    small.mkdir()
    (small / "Snakefile").write_text(ONE_RULE)
    peer = [sys.executable, "-m", "snakemake", "--cores", "all"]
    timed(peer, small)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(pipeline_seconds(experiment, folder))
        theirs.append(timed(peer, small))
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    """Print a table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.2f}, {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        rows = {
            "pipeline": (pipeline_seconds(arguments.experiment, folder), bare_seconds(arguments.experiment, folder))
        }
        rows["nothing to do"] = noop_seconds(arguments.experiment, folder, arguments.repeats)
    print(f"{'':<16}{'ours s':>10}{'peer s':>10}{'ratio':>8}")
    for label, (ours, peer) in rows.items():
        print(f"{label:<16}{ours:>10.2f}{peer:>10.2f}{ours / peer:>8.3f}")
    print(
        json.dumps(
            {
                label: {"ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(ours / peer, 4)}
                for label, (ours, peer) in rows.items()
            }
        )
    )


if __name__ == "__main__":
    main()
