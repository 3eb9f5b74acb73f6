"""The plan that is drawn is the plan that is trained by, and its drawing stands alone."""

import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headrace.config.compose import load
from headrace.config.recipe import RecipeConfig
from headrace.recipe.schedule import Schedule, Step
from headrace.reporting.recipe import facts_of, figure, phase_rows, plan_of, read_plan, standalone, write_recipe

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def v3() -> RecipeConfig:
    return load(["experiment=v3_671b"]).recipe


@pytest.mark.parametrize("experiment", ["v3_671b", "tiny"])
def test_every_column_is_the_schedules_own(experiment: str, tmp_path: Path) -> None:
    recipe = load([f"experiment={experiment}"]).recipe
    data, _ = write_recipe(recipe, tmp_path)
    written, schedule = json.loads(data.read_text()), Schedule(recipe)
    table = written["table"]
    assert set(Step._fields) - set(table) == (set() if recipe.optimizer.name == "muon" else {"muon_learning_rate"})
    assert (written["steps"], written["tokens"]) == (schedule.steps, schedule.tokens_after(schedule.steps))
    for row, step in enumerate(table["step"]):
        for name, values in table.items():
            assert values[row] == getattr(schedule.at(step), name)
    assert sum(phase["tokens"] for phase in written["phases"]) == written["tokens"]


def test_the_published_phases_are_told(v3: RecipeConfig) -> None:
    assert phase_rows(facts_of(plan_of(v3)))[1:] == [
        ("main", "227,784", "15,360", "4,096", "14,330,930,135,040", "0.00022 to 7.3e−6", "none"),
        ("context_32k", "1,000", "1,920", "32,768", "62,914,560,000", "7.3e−6", "factor 40"),
        ("context_128k", "1,000", "480", "131,072", "62,914,560,000", "7.3e−6", "factor 40"),
    ]


def test_the_drawing_stands_alone_with_one_panel_per_quantity(v3: RecipeConfig, tmp_path: Path) -> None:
    _, picture = write_recipe(v3, tmp_path)
    text = picture.read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert "var(" not in text and "prefers-color-scheme: dark" in text and "url(" not in text
    words = {element.text for element in root.iter(f"{SVG}text")}
    assert words >= {
        "learning rate", "sequences per step", "tokens per sequence", "bias update speed (gamma)",
        "MTP weight (lambda)", "balance loss weight (alpha)",
    }  # fmt: skip
    assert "Muon learning rate" not in words
    assert len(list(root.iter(f"{SVG}path"))) == 6
    marks = [line for line in root.iter(f"{SVG}line") if line.get("class") == "implied"]
    assert len(marks) == 6 * 3  # where main and both extensions begin


def test_the_drawing_in_the_docs_is_current(v3: RecipeConfig) -> None:
    """Made anew by `write_recipe` where it is not."""
    picture = Path(__file__).resolve().parents[2] / "docs" / "images" / "recipe-v3-671b.svg"
    assert picture.read_text() == standalone(facts_of(plan_of(v3)))


def test_a_narrow_page_has_the_panels_below_one_another(v3: RecipeConfig) -> None:
    drawn = figure(facts_of(plan_of(v3)), "recipe.json")
    wide, narrow = (ElementTree.fromstring(str(part)) for part in (drawn.wide, drawn.narrow))
    assert float(narrow.get("height", 0)) > 1.9 * float(wide.get("height", 0))
    assert [cell[0] for cell in drawn.numbers][:2] == ["learning rate", "sequences per step"]
    assert "main at 469B, context_32k at 14.8T, context_128k at 14.9T" in drawn.caption


def test_a_jump_is_drawn_as_one(v3: RecipeConfig) -> None:
    """The two sides of a switch are neighbours in the table, so that its line is upright."""
    plan, step = facts_of(plan_of(v3)), 15_360 * 4096
    for quantity in plan.schedules:
        if "lambda" in quantity.name or "gamma" in quantity.name:
            jumps = [(b[0] - a[0]) for a, b in pairwise(quantity.points) if a[1] != b[1]]
            assert jumps == [step]


def test_writing_again_gives_the_same_bytes(v3: RecipeConfig, tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write_recipe(v3, tmp_path)]
    assert [path.read_bytes() for path in write_recipe(v3, tmp_path)] == first
    assert read_plan(tmp_path / "recipe.json") == facts_of(plan_of(v3))
