"""`snakemake precision_study`: beside the pipeline, or a part of the report where `study.in_report` says so."""

import json
from pathlib import Path

import pytest

from project import STAGES, Project, copy_of

pytestmark = pytest.mark.workflow

# 7 steps of two formats that every machine has: the arithmetic of FP8 has tests of its own.
SMALL = "study.tokens=7168 study.ablations=[] precision@study.candidate=fp32 tracking=disabled"
SHOWN = f"{SMALL} study.in_report=true"


@pytest.mark.slow
def test_the_study_is_a_target_of_its_own_and_the_report_takes_it_in_when_asked(tiny: Project, tmp_path: Path) -> None:
    project = copy_of(tiny, tmp_path, STAGES)
    assert project.planned(settings=SMALL) == []
    assert project.planned("precision_study", settings=SMALL) == ["precision_study"]
    assert project.planned(settings=SHOWN) == ["precision_study", "report"]
    result = project.run(settings=SHOWN)
    assert result.returncode == 0, result.stderr
    made = json.loads((project.place("precision_study") / "provenance.json").read_text())["made"]
    assert made in result.stderr
    assert made.startswith("FP32 - BF16: ")
    report = (project.place("report") / "artifact" / "report.html").read_text()
    assert 'id="precision"' in report
    assert "7 steps" in report
    manifest = json.loads((project.place("report") / "artifact" / "manifest.json").read_text())
    assert manifest["inputs"]["precision_study"] == (project.place("precision_study") / "done").read_text().strip()
    assert project.planned(settings=SHOWN) == []
    assert project.planned("precision_study", settings=SMALL) == [], "who reads the study does not change it"
    assert project.planned() == [], "the report without the study is still there"


def test_an_impossible_study_is_refused_before_anything_runs(tmp_path: Path) -> None:
    result = Project(tmp_path).run("precision_study", settings="study.tokens=1000")
    assert result.returncode != 0
    assert "study.tokens=1000 is less than one step of 1024 tokens" in result.stderr + result.stdout
    assert list(tmp_path.glob("results/[!l]*")) == []
