"""What runs again and what does not, asked of the real snakemake."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from project import CANARIES, ROOT, STAGES, Project, copy_of

pytestmark = pytest.mark.workflow

AFTER_TOKENIZE = ["pretrain", "convert", "evaluate", "publish", "report"]


def test_everything_is_there_and_a_second_run_does_nothing(tiny: Project) -> None:
    for stage in STAGES:
        manifest = json.loads((tiny.place(stage) / "artifact" / "manifest.json").read_text())
        assert (tiny.place(stage) / "done").read_text() == manifest["hash"] + "\n"
        assert manifest["producer"]["stage"] == stage
    result = tiny.run()
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout + result.stderr
    assert tiny.planned() == []


@pytest.mark.parametrize(
    ("settings", "rerun"),
    [
        ("recipe.learning_rate.peak=2e-3", AFTER_TOKENIZE),
        ("recipe.optimizer.name=adamw", AFTER_TOKENIZE),
        ("evaluate.tasks=[reasoning_gym]", ["evaluate", "publish", "report"]),
        ("convert.dtype=fp32", ["convert", "evaluate", "publish", "report"]),
        ("publish.title='Another title'", ["publish", "report"]),
        ("tracking=disabled", []),
        ("tracking.log_every=3 tracking.log_level=debug", []),
        ("launch.threads=1 launch.minutes=30", []),
        ("parallel.microbatch=2", []),
        ("checkpoint.interval=7", []),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it(tiny: Project, settings: str, rerun: list[str]) -> None:
    assert tiny.planned(settings=settings) == rerun


def test_cores_and_another_profile_rerun_nothing(tiny: Project) -> None:
    assert tiny.planned("--cores", "1") == []
    assert tiny.planned("--workflow-profile", str(ROOT / "profiles" / "slurm")) == []


def test_the_old_value_finds_its_old_results(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, STAGES)
    changed = project.run(settings="evaluate.tasks=[]")
    assert changed.returncode == 0, changed.stderr
    assert project.planned(settings="evaluate.tasks=[]") == []
    assert project.planned() == []


def test_a_reformatted_rule_reruns_nothing(tiny: Project, tmp_path: Path) -> None:
    for name in ("Snakefile", "workflow", "profiles"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    rule = tmp_path / "workflow" / "rules" / "pretrain.smk"
    before = rule.read_text()
    rule.write_text(before.replace('graph.command("pretrain")', 'graph.command(  "pretrain"  ) + " "'))
    assert rule.read_text() != before
    shutil.copy(ROOT / "environment.yml", tmp_path / "environment.yml")
    assert Project(tiny.folder, tmp_path / "Snakefile").planned() == []


RAISED = """
import dataclasses, sys
from headrace.stages import table
table.STAGES = tuple(dataclasses.replace(s, version=99) if s.name == "convert" else s for s in table.STAGES)
from snakemake.cli import main
sys.argv[0] = "snakemake"
main(sys.argv[1:])
"""


def test_a_raised_version_reruns_the_stage_and_what_follows(tiny: Project) -> None:
    words = tiny.command("--dry-run")[3:]
    result = subprocess.run([sys.executable, "-c", RAISED, *words], capture_output=True, text=True, timeout=60)
    jobs = [line.split(": ")[1] for line in (result.stdout + result.stderr).splitlines() if line.startswith("Job ")]
    assert jobs == ["convert", "evaluate", "publish", "report"]


def test_an_edited_source_is_refused_until_it_is_indexed(tmp_path: Path) -> None:
    text = tmp_path / "texts" / "a.txt"
    text.parent.mkdir()
    for name in ("a", "b", "c", "d", "e", "f"):
        (text.parent / f"{name}.txt").write_text(f"text {name}\n" * 400)
    settings = f"corpus=files corpus.paths=[{text.parent}] corpus.validation_fraction=0.2 corpus.heldout_fraction=0.2"
    project = Project(tmp_path / "project")
    project.folder.mkdir()
    assert project.run("corpus", settings=settings).returncode == 0
    text.write_text("changed\n" * 400)
    refused = project.run("corpus", settings=settings)
    assert refused.returncode != 0
    assert f"{text} changed since it was indexed" in refused.stderr + refused.stdout
    assert "headrace index" in refused.stderr + refused.stdout
    index = [sys.executable, "-m", "headrace.cli", "index", "experiment=tiny", *settings.split()]
    assert subprocess.run(index, cwd=project.folder, capture_output=True, timeout=60).returncode == 0
    assert project.planned("corpus", settings=settings) == ["corpus"]


def test_a_stage_name_is_a_target_and_the_module_reaches_the_same_place(tiny: Project, tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    fresh = Project(tmp_path / "fresh")
    planned = fresh.planned("evaluate")
    assert sorted(set(planned)) == sorted(["corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate"])
    module = [sys.executable, "-m", "headrace.stages.evaluate", "experiment=tiny"]
    result = subprocess.run(module, cwd=tiny.folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert f"{tiny.place('evaluate').name}  already finished" in result.stderr


def test_a_wrong_setting_is_refused_before_anything_starts(tiny: Project) -> None:
    result = tiny.run(settings="recipe.tokenz=1")
    assert result.returncode != 0
    assert "config: Could not override 'recipe.tokenz'" in result.stderr + result.stdout


HOSTILE = ["a; touch PWNED", "$(touch PWNED)", "`touch PWNED`", 'q" && touch PWNED "', "{input} {{x}} | touch PWNED"]


def test_values_cannot_inject_a_shell_command(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, STAGES[:-1])
    title = " ".join(HOSTILE)
    result = project.run("publish", settings="publish.title='" + title + "'")
    assert result.returncode == 0, result.stderr
    assert title in (project.place("publish") / "artifact" / "repository" / "README.md").read_text()
    for text in (" ".join(HOSTILE[:-1]), HOSTILE[-1]):  # braces may end what would run the others
        project.run("publish", config=(f"experiment=tiny{text}",))
        project.run("publish", f"results/tokenize/x/batches/{text}.done")
    assert [path for root in (project.folder, ROOT) for path in root.glob("**/PWNED*")] == []


def test_secrets_are_in_no_file_that_a_run_writes(tiny: Project) -> None:
    files = [path for path in tiny.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 100
    found = {
        str(path): name for path in files for name, secret in CANARIES.items() if secret.encode() in path.read_bytes()
    }
    assert found == {}


def test_runs_are_listed_with_what_makes_them_different(tiny: Project) -> None:
    command = [sys.executable, "-m", "headrace.cli", "runs"]
    result = subprocess.run(command, cwd=tiny.folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert set(STAGES) <= set(rows)
    assert "recipe.tokens=61440" in rows["pretrain"] or "model.hidden_size=64" in rows["pretrain"]
    assert "done" in rows["pretrain"]
    assert tiny.place("pretrain").name in rows["pretrain"]


def test_one_wandb_run_per_stage_in_one_group(tiny: Project) -> None:
    runs = {stage: json.loads((tiny.place(stage) / "tracking" / "run.json").read_text()) for stage in STAGES}
    assert {run["run_id"] for run in runs.values()} == {f"{stage}-{tiny.place(stage).name}" for stage in STAGES}
    assert len({run["group"] for run in runs.values()}) == 1


def test_snakemakes_own_report_holds_the_page(tiny: Project) -> None:
    result = tiny.run("--report", "snakemake-report.zip")
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(tiny.folder / "snakemake-report.zip") as archive:
        pages = [name for name in archive.namelist() if name.endswith("report.html")]
        assert any(b"bits per byte" in archive.read(name).lower() for name in pages)


def test_the_snakefile_imports_nothing_heavy() -> None:
    code = (
        "import sys; from headrace.stages.graph import Graph;"
        "print([m for m in ('torch', 'wandb', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_root_snakefile_is_a_table_of_contents() -> None:
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 60
