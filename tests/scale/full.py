"""10 GB of text through the data stages, as `make test-scale`: 1, 2 and 3 workers, ten kills, equal bytes.

Needs about 40 GB of disk and, on two cores, 20 minutes to an hour. The last line printed is one JSON object.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale.data_work import Work, write_text

MEMORY = 2 << 30


def main() -> int:
    """0 where all runs end with equal bytes, leave nothing behind, and no process needed more than 2 GiB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-scale-", dir=given.folder) as name:
        folder = Path(name)
        documents = write_text(folder / "text", given.megabytes)
        print(f"{documents:,} documents, {given.megabytes:,.0f} MB of text", flush=True)
        settings = (f"tokens.shards={max(8, int(given.megabytes // 100))}", "launch.pieces_per_job=16")
        runs, first = [], {}
        for workers, kills in ((1, 0), (2, given.kills), (3, 0)):
            work = Work(folder / "text", folder / f"results-{workers}", workers, settings)
            work.run(kills, given.seed, within=0.6 * runs[0]["seconds"] if runs else 0.0)
            first = first or work.content
            equal = work.content == first
            runs.append(
                {
                    "workers": workers,
                    "kills": work.kills,
                    "seconds": round(work.seconds, 1),
                    "most_memory_gib": round(work.most_memory / (1 << 30), 2),
                    "most_together_gib": round(work.most_together / (1 << 30), 2),
                    "leftovers": work.leftovers,
                    "equal": equal,
                }
            )
            print(json.dumps(runs[-1]), flush=True)
            shutil.rmtree(work.results)
        good = all(run["equal"] and not run["leftovers"] for run in runs) and runs[1]["kills"] == given.kills
        small = max(run["most_memory_gib"] for run in runs) * (1 << 30) < MEMORY
        print(json.dumps({"megabytes": given.megabytes, "documents": documents, "runs": runs, "equal": good}))
    return 0 if good and small else 1


if __name__ == "__main__":
    sys.exit(main())
