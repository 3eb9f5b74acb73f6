"""report: figures and tables of the whole run, as one HTML page and a short table on the terminal."""

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json, write_atomic
from headrace.config.compose import group_to_dict, load
from headrace.config.schema import Config
from headrace.reporting import read
from headrace.reporting.comparison import read_comparisons
from headrace.reporting.data import read_data
from headrace.reporting.facts import PrecisionStudy, Publication, ReportFacts
from headrace.reporting.page import with_comparisons, write_report
from headrace.reporting.reliability import RELIABILITY, read_reliability
from headrace.reporting.table import summary_table
from headrace.stages.imported import origin
from headrace.stages.places import Place
from headrace.stages.publish import PUBLICATION, repository_of
from headrace.stages.run import Door, Outcome, Run, main
from headrace.stages.table import STAGES

PAGE = "report.html"
TABLE = "summary.txt"


def body(run: Run) -> Outcome:
    """Collect the facts of every stage, draw the page, write the table."""
    facts = collect(run)
    write_report(facts, run.output / PAGE)
    write_atomic(run.output / TABLE, (summary_table(facts) + "\n").encode())
    return Outcome(str(shown_page(run.place)), {"bytes": (run.output / PAGE).stat().st_size})


def collect(run: Run) -> ReportFacts:
    """Everything that the report shows; every input is verified first.

    Of text and tokens, which may be terabytes, JSON is read and a few rows, which the loader verifies as it reads them.
    """
    folders = {parent: run.input(parent, quick=parent in ("corpus", "tokenize")) for parent in run.parents}
    places = {**run.parents, "report": run.place}
    records = {name: read_json(place.folder / "provenance.json") for name, place in run.parents.items()}
    trained, config = records["pretrain"], run.config
    return ReportFacts(
        title=config.publish.title,
        command=run.command,
        results_folder=str(run.place.folder.parents[1]),
        report_path=str(shown_page(run.place)),
        finished=max(record["finished"] for record in records.values()).replace("T", " ").replace("+00:00", " UTC"),
        stages=tuple(
            read.read_stage(row.name, tuple(places[row.name].slice["parents"]), places[row.name].folder)
            for row in STAGES
            if row.name in places
        ),
        config=_as_written(run.config, places),
        differences=read.differences(_as_written(load(), places), _as_written(run.config, places)),
        data=read_data(folders["corpus"], folders["tokenizer"], folders["tokenize"]),
        training=read.read_training(folders["pretrain"], config.model),
        evaluation=read.read_evaluation(folders["evaluate"]),
        publication=_publication(folders["publish"], config),
        study=_study(run, folders),
        reliability=read_reliability(folders["pretrain"] / RELIABILITY),
        weights_from=origin(config.train.from_, run.place.folder.parents[1]),
        versions=trained["versions"],
        machine={key.replace("_", " "): str(value) for key, value in trained["machine"].items()},
        code={
            "commit": trained["code"]["commit"] or "none",
            "work tree": "with uncommitted changes" if trained["code"]["dirty"] else "clean",
        },
    )


def _as_written(config: Config, stages: Collection[str]) -> dict[str, Any]:
    """The groups that change a result, in the spelling of the YAML files; the report's fingerprint covers them all."""
    return {key: group_to_dict(getattr(config, key)) for row in STAGES if row.name in stages for key in row.keys}


def _study(run: Run, folders: Mapping[str, Path]) -> PrecisionStudy | None:
    """The precision study, where `study.in_report` makes it a parent."""
    if "precision_study" not in folders:
        return None
    return read.read_study(
        folders["precision_study"], f"precision_study/{run.parents['precision_study'].fingerprint}/artifact/study.json"
    )


def _publication(folder: Path, config: Config) -> Publication:
    facts = read_json(folder / PUBLICATION)
    files = [path for path in repository_of(folder).rglob("*") if path.is_file()]
    shards = sum(path.suffix == ".safetensors" for path in files)
    return Publication(
        repository=facts["repo_id"] if facts["commit"] else None,
        commit=facts["commit"],
        tag=facts["tag"],
        folder=str(repository_of(folder)),
        format=f"{config.convert.dtype.upper()} safetensors, {shards} shard{'s' if shards != 1 else ''}",
        files=len(files),
        size_bytes=sum(path.stat().st_size for path in files),
    )


def show(place: Place) -> None:
    """Lay the page beside the artifact, where Snakemake may delete it, and print the table."""
    show_page(place.folder)
    print("\n" + (place.artifact / TABLE).read_text(encoding="utf-8"), file=sys.stderr)


def show_page(folder: Path) -> None:
    """Lay the page of a finished report beside its artifact, with all comparisons that its run takes part in by now."""
    evaluate = read_json(folder / "stage.json")["parents"]["evaluate"]
    artifact = folder / "artifact"
    page = manifests.content(artifact, manifests.read(artifact), PAGE).decode()
    found = read_comparisons(folder.parents[1], evaluate)
    write_atomic(folder / PAGE, with_comparisons(page, found).encode())


def shown_page(place: Place) -> Path:
    """The copy of the page that Snakemake declares."""
    return place.folder / PAGE


DOOR = Door("report", body, after=show)

if __name__ == "__main__":
    sys.exit(main(DOOR))
