"""Targets beside the DAG, through the real snakemake: compare, sync and ablations."""

import json
import re
from pathlib import Path

import pytest

from headrace.artifacts.files import read_json
from project import STAGES, Project, copy_of
from small_corpus import write_texts
from wandb_file import read_wandb
from wandb_stand_in import calls, install

pytestmark = pytest.mark.workflow


def test_two_evaluations_of_one_model_are_compared_and_found_equal(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, STAGES)
    first = tiny.place("evaluate").name
    again = project.run("evaluate", settings="evaluate.samples=0")
    assert again.returncode == 0, again.stderr
    second = project.place("evaluate").name
    result = project.run("compare", config=("experiment=tiny", f"runs=[{first[:8]},{second}]"))
    assert result.returncode == 0, result.stderr
    (path,) = project.folder.glob("results/compare/*/compare.json")
    facts = read_json(path)
    assert facts["runs"][1] == {"name": second, "differs": ["evaluate.samples=0"]} and facts["left_out"] == []
    assert {row["task"] for row in facts["rows"]} >= {"bits_per_byte", "humaneval_likelihood", "reasoning_gym"}
    found = [row["differences"][second] for row in facts["rows"]]
    assert {(each["value"], each["found"]) for each in found} == {(0.0, None)}
    table = path.with_name("compare.md").read_text()
    assert table in result.stdout + result.stderr
    assert table in (project.folder / "results" / "compare.log").read_text()
    (record,) = path.parent.glob("tracking/wandb/offline-run-*/*.wandb")
    assert read_wandb(record).config["runs"] == [first, second]
    page = project.folder / "results" / "report" / tiny.place("report").name / "report.html"
    assert f"snakemake compare --config runs=[{first},{second}]" in page.read_text()


@pytest.mark.parametrize("runs", [(), ("runs=77",)])
def test_runs_that_cannot_be_compared_fail_with_the_programs_line(
    tiny: Project, tmp_path: Path, runs: tuple[str, ...]
) -> None:
    project = copy_of(tiny, tmp_path, ("evaluate",))
    result = project.run("compare", config=("experiment=tiny", *runs))
    assert result.returncode != 0 and "returned non-zero exit status 2" in result.stderr
    (line,) = (project.folder / "results" / "compare.log").read_text().splitlines()
    assert line.startswith("headrace compare: runs: ") and not (project.folder / "results" / "compare").exists()


def test_sync_uploads_the_run_of_every_stage_and_links_it_to_what_it_read(
    tiny: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(tiny, tmp_path / "project", STAGES)
    told = install(tmp_path, monkeypatch)
    places = {stage: tiny.place(stage) for stage in STAGES}
    read = {stage: read_json(place / "stage.json")["parents"] for stage, place in places.items()}
    links = sum(map(len, read.values()))
    for said in (f"8 runs, 8 uploaded, {links} inputs linked", "8 runs, 0 uploaded, 0 inputs linked"):
        result = project.run("sync")
        assert result.returncode == 0, result.stderr
        assert said in (project.folder / "results" / "sync.log").read_text()
    ((word, *fragments),) = calls(told, "program")
    assert word == "sync"
    runs = {run.run_id: run for folder in fragments for run in map(read_wandb, Path(folder).glob("*.wandb"))}
    made = {
        f"headrace/{name}:{alias}" for run in runs.values() for name, _, aliases in run.artifacts for alias in aliases
    }
    assert set(runs) == {f"{stage}-{place.name}" for stage, place in places.items()}
    assert {run.group for run in runs.values()} == {places["report"].name}
    assert {run.exit_code for run in runs.values()} == {0}
    trained = [row for row in runs[f"pretrain-{places['pretrain'].name}"].history if "loss" in row]
    rows = [json.loads(line) for line in (places["pretrain"] / "tracking" / "metrics.jsonl").open()]
    assert [row["loss"] for row in trained] == [row["loss"] for row in rows if "loss" in row] != []
    used = calls(told, "use_artifact")
    assert {artifact for _, artifact in used} <= made
    assert sorted((run, artifact.partition(":")[0]) for run, artifact in used) == sorted(
        (f"headrace/{stage}-{place.name}", f"headrace/{parent}-{fingerprint}")
        for stage, place in places.items()
        for parent, fingerprint in read[stage].items()
    )


def test_ablations_without_a_target_are_all_of_them_and_any_target_is_the_baselines(tmp_path: Path) -> None:
    write_texts(tmp_path)
    project, settings = Project(tmp_path), f"corpus=files corpus.paths=[{tmp_path}/texts]"

    def planned(*target: str) -> list[str]:
        result = project.run(*target, "--dry-run", settings=settings, config=("experiment=ablations",))
        assert result.returncode == 0, result.stderr
        return re.findall(r"^Job \d+: (\w+)", result.stdout + result.stderr, re.MULTILINE)

    assert planned() == planned("ablations") == ["ablations"]
    everything = planned("all")
    assert everything[-1] == "report" and "ablations" not in everything
    refused = project.run("ablations", settings=settings)
    assert refused.returncode != 0
    (line,) = (tmp_path / "results" / "ablations.log").read_text().splitlines()
    assert line.startswith("headrace ablations: experiment=tiny: `snakemake ablations` trains experiments of its own")
