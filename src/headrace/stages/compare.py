"""compare: finished evaluations side by side, paired item by item. Not a stage: it hashes nothing and trains nothing.

    python -m headrace.stages.compare runs=[3fa1,77c0,b2d9] [paths.results=results]
    snakemake compare --config runs=[3fa1,77c0,b2d9]

`runs` are fingerprints of evaluate (`headrace runs` lists them) or beginnings of them, of any configurations; the first
is what the others are compared with. Every artifact is verified before it is read. The result lies in
`results/compare/<hash of the fingerprints>/`: `compare.json`, the same as Markdown, which is printed too, and as a
page, and a tracked run with the differences. Reports of these runs that are finished show it from then on.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import parse_json, read_bytes, read_json, write_atomic, write_json
from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.evaluation.comparison import EvaluatedRun, compare, markdown
from headrace.reporting.comparison import read_comparison
from headrace.reporting.page import write_comparison
from headrace.reporting.runs import differences
from headrace.stages.report import show_page
from headrace.stages.run import close_log, failed, open_log
from headrace.stages.table import fingerprint
from headrace.tracking.tracker import Tracker

FACTS, TABLE, PAGE = "compare.json", "compare.md", "compare.html"
_USAGE = "usage: python -m headrace.stages.compare runs=[<evaluate>,<evaluate>,...] [key=value ...]   (Hydra overrides)"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the runs that `runs=[...]` names; other words are Hydra overrides, such as `paths.results`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--help"], ["-h"]):
        print(_USAGE)
        return 0
    try:
        named = [word for word in words if word.startswith("runs=")]
        config = load([word for word in words if word not in named])
        folder = write(config, prefixes(named))
    except (Exception, KeyboardInterrupt) as error:
        return failed("compare", error)
    print((folder / TABLE).read_text(encoding="utf-8"))
    print(folder / TABLE, file=sys.stderr)
    return 0


def prefixes(words: Sequence[str]) -> list[str]:
    """The runs that `runs=[a,b,c]` names, at least two; `UserError` with the spelling where it is another."""
    found = (
        re.fullmatch(r"runs=\[?([0-9a-f]{1,12}(?:\s*,\s*[0-9a-f]{1,12})+)\]?", words[0]) if len(words) == 1 else None
    )
    if not found:
        raise UserError("runs: name two or more fingerprints of evaluate, as in runs=[3fa1,77c0]; see `headrace runs`")
    return re.split(r"\s*,\s*", found[1])


def write(config: Config, names: Sequence[str]) -> Path:
    """Compare finished evaluations; returns the folder with the result as JSON, Markdown and a page."""
    results = Path(config.paths.results)
    folders = [find(results, name) for name in names]
    if len(set(folders)) < len(folders):
        raise UserError(f"runs: {', '.join(names)} name the same run twice; name each once")
    facts = compare(_read(folders), config.evaluate.bootstrap)
    found = [folder.name for folder in folders]
    folder = results / "compare" / fingerprint({"runs": found, "resamples": config.evaluate.bootstrap})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, facts)
    write_atomic(folder / TABLE, markdown(facts).encode())
    write_comparison(read_comparison(folder / FACTS, results), folder / PAGE)
    _track(config, folder, folders, facts)
    _show_in_reports(results, set(found))
    return folder


def _show_in_reports(results: Path, evaluates: set[str]) -> None:
    for artifact in sorted((results / "report").glob("*/artifact")):
        if read_json(artifact.parent / "stage.json")["parents"]["evaluate"] in evaluates:
            show_page(artifact.parent)


def _track(config: Config, folder: Path, compared: Sequence[Path], facts: dict[str, Any]) -> None:
    inputs = [
        {"name": f"evaluate-{run.name}", "kind": "evaluate", "hash": manifests.read(run / "artifact").hash}
        for run in compared
    ]
    name, settings, log = f"compare-{folder.name}", config.tracking, open_log(folder / "log.txt", "info")
    with Tracker(
        folder / "tracking",
        run_id=name,
        group=name,
        job_type="compare",
        config={"runs": [run.name for run in compared]},
        inputs=inputs,
        backend=settings.backend,
        wandb_mode=settings.wandb,
        project=settings.project,
        entity=settings.entity,
        log=log,
    ) as tracker:
        tracker.summary(
            {
                f"{row['task']}/{row['metric']}/{run} - {facts['first']}": entry
                for row in facts["rows"]
                for run, entry in row["differences"].items()
            }
        )
    close_log(log)


def find(results: Path, prefix: str) -> Path:
    """The run directory of the one finished evaluate whose fingerprint begins so."""
    begun = sorted(path for path in (results / "evaluate").glob(f"{prefix}*") if path.is_dir())
    found = [path for path in begun if (path / "artifact").exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"runs: {prefix} begins {' and '.join(path.name for path in found)}; write more of it")
    unfinished = f"{begun[0].name} is not finished" if begun else f"no evaluate under {results} begins so"
    raise UserError(f"runs: {prefix}: {unfinished}; `headrace runs` lists what there is")


def _read(folders: Sequence[Path]) -> list[EvaluatedRun]:
    settings = [_settings(folder) for folder in folders]
    runs = []
    for folder, own in zip(folders, settings, strict=True):
        artifact = folder / "artifact"
        manifests.verify(artifact)
        path = artifact / "items.jsonl"
        entries = [parse_json(line, path) for line in read_bytes(path).splitlines()]
        runs.append(
            EvaluatedRun(folder.name, read_json(artifact / "results.json"), entries, differences(own, settings[0]))
        )
    return runs


def _settings(folder: Path) -> dict[str, Any]:
    """Every value that this run and the runs that it was made from were given, by group."""
    own = read_json(folder / "stage.json")
    values: dict[str, Any] = {}
    for parent, name in own["parents"].items():
        values |= _settings(folder.parents[1] / parent / name)
    values |= own["config"]
    return values


if __name__ == "__main__":
    sys.exit(main())
