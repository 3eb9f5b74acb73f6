"""The plan of a training run, drawn before it begins: every schedule over tokens, and the phases of the recipe.

`write_recipe` puts two files beside a run, and both follow from the configuration alone:

    recipe.json   {"steps", "tokens", "phases": [...], "table": {column: one value per chosen step}}
    recipe.svg    one small panel per quantity, with the page's colours in it, to be opened by itself

The report reads recipe.json back, so that it shows the plan that was trained by, and draws the same panels.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from headrace.artifacts.files import read_json, write_atomic, write_json
from headrace.config.recipe import RecipeConfig
from headrace.recipe.schedule import Phase, Schedule, Step
from headrace.reporting.curves import Line, LineChart, line_parts
from headrace.reporting.facts import Plan, PlannedPhase
from headrace.reporting.facts import Schedule as Quantity
from headrace.reporting.figures import Figure, twice
from headrace.reporting.quantities import exact, plain, tick
from headrace.reporting.svg import HALF, WIDE, drawing, element

DATA, DRAWING = "recipe.json", "recipe.svg"
POINTS = 400
_QUANTITIES = {
    "learning_rate": "learning rate",
    "muon_learning_rate": "Muon learning rate",
    "sequences": "sequences per step",
    "sequence_length": "tokens per sequence",
    "bias_update_speed": "bias update speed (gamma)",
    "mtp_weight": "MTP weight (lambda)",
    "balance_weight": "balance loss weight (alpha)",
}
_PANEL, _BELOW, _BETWEEN = 168, 14, 40
"""Height of a panel, and the gaps below and beside it."""


def write_recipe(recipe: RecipeConfig, folder: Path) -> tuple[Path, Path]:
    """Write recipe.json and recipe.svg into `folder`, over what is there; returns their paths."""
    data, picture = folder / DATA, folder / DRAWING
    write_json(data, plan_of(recipe))
    write_atomic(picture, standalone(read_plan(data)).encode())
    return data, picture


def plan_of(recipe: RecipeConfig, points: int = POINTS) -> dict[str, Any]:
    """The content of recipe.json; Muon's rate is left out where AdamW updates everything."""
    schedule = Schedule(recipe)
    steps = schedule.table(points)
    columns = [name for name in Step._fields if recipe.optimizer.name == "muon" or name != "muon_learning_rate"]
    return {
        "steps": schedule.steps,
        "tokens": schedule.tokens_after(schedule.steps),
        "phases": [_phase(schedule, phase) for phase in schedule.phases],
        "table": {name: [getattr(step, name) for step in steps] for name in columns},
    }


def read_plan(path: Path) -> Plan:
    """A recipe.json as facts."""
    return facts_of(read_json(path))


def facts_of(planned: Mapping[str, Any]) -> Plan:
    """The content of a recipe.json as facts."""
    table = planned["table"]
    tokens = [float(seen) for seen in table["tokens_before"]]
    return Plan(
        phases=tuple(_planned(phase) for phase in planned["phases"]),
        schedules=tuple(
            Quantity(words, tuple(zip(tokens, map(float, table[name]), strict=True)))
            for name, words in _QUANTITIES.items()
            if name in table
        ),
    )


def section(plan: Plan, source: str) -> dict[str, Any]:
    """All that the template of the section needs."""
    return {"figure": figure(plan, source), "rows": phase_rows(plan)}


def figure(plan: Plan, source: str) -> Figure:
    """All panels at the page's widths."""
    begins = ", ".join(f"{phase.name} at {tick(phase.tokens_before)}" for phase in plan.phases[1:])
    marks = f" Vertical lines: tokens at which a phase begins, {begins}." if begins else ""
    columns = ("quantity", "points", "first", "lowest", "highest", "last")
    return twice(lambda width: _drawn(plan, width), f"What the recipe changes, as planned.{marks}", source, columns,
                 tuple(map(_summary, plan.schedules)))  # fmt: skip


def phase_rows(plan: Plan) -> list[tuple[str, ...]]:
    """A row for each phase: name, steps, sequences, their length, tokens, first and last learning rate, YaRN."""
    return [
        (
            phase.name,
            exact(phase.steps),
            _range(*map(exact, phase.sequences)),
            exact(phase.sequence_length),
            exact(phase.tokens),
            _range(*map(plain, phase.learning_rate)),
            "none" if phase.yarn_factor is None else f"factor {plain(phase.yarn_factor)}",
        )
        for phase in plan.phases
    ]


def standalone(plan: Plan) -> str:
    """The panels as a file of their own: the same drawing with its style inside."""
    width, height = WIDE + 2 * _BELOW, _height(plan, WIDE) + 2 * _BELOW
    parts = [
        element("style", Markup(_style())),  # noqa: S704  our own file
        element("rect", width=width, height=height, class_="page"),
        element("g", *_panels(plan, WIDE), transform=f"translate({_BELOW},{_BELOW})"),
    ]
    root = drawing(width, height, "The recipe's schedules over training tokens", parts)
    return str(root).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + "\n"


def _drawn(plan: Plan, width: float) -> Markup:
    parts = _panels(plan, width)
    return drawing(width, _height(plan, width), "The recipe's schedules over training tokens", parts)


def _panels(plan: Plan, width: float) -> list[Markup]:
    columns, marks = _columns(width), tuple(float(phase.tokens_before) for phase in plan.phases[1:])
    each = (width - (columns - 1) * _BETWEEN) / columns
    parts = []
    for number, quantity in enumerate(plan.schedules):
        row, column = divmod(number, columns)
        write = tick if max(value for _, value in quantity.points) >= 1000 else plain
        chart = LineChart(
            quantity.name, quantity.name, (Line("", quantity.points, 1),),
            zero=True, height=_PANEL, write_y=write, marks=marks,
        )  # fmt: skip
        place = f"translate({column * (each + _BETWEEN):g},{row * (_PANEL + _BELOW):g})"
        parts.append(element("g", *line_parts(chart, each), transform=place))
    return parts


def _columns(width: float) -> int:
    return 2 if width >= 2 * HALF else 1


def _height(plan: Plan, width: float) -> float:
    return -(-len(plan.schedules) // _columns(width)) * (_PANEL + _BELOW) - _BELOW


def _summary(quantity: Quantity) -> tuple[str, ...]:
    values = [value for _, value in quantity.points]
    return quantity.name, exact(len(values)), *map(plain, (values[0], min(values), max(values), values[-1]))


def _phase(schedule: Schedule, phase: Phase) -> dict[str, Any]:
    before, after = schedule.tokens_before(phase.first), schedule.tokens_before(phase.end)
    rates = [schedule.at(step).learning_rate for step in (phase.first, phase.end - 1)]
    return {**asdict(phase), "tokens_before": before, "tokens": after - before, "learning_rate": rates}


def _planned(phase: Mapping[str, Any]) -> PlannedPhase:
    scaling, rates = phase["rope_scaling"], phase["learning_rate"]
    return PlannedPhase(
        name=phase["name"],
        steps=phase["end"] - phase["first"],
        tokens_before=phase["tokens_before"],
        tokens=phase["tokens"],
        sequences=(phase["sequences_least"], phase["sequences_most"]),
        sequence_length=phase["sequence_length"],
        learning_rate=(rates[0], rates[1]),
        yarn_factor=scaling and scaling["factor"],
    )


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _style() -> str:
    """What the page's style sheet says of drawings, its colours written out: not every viewer knows CSS variables."""
    sheet = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    rules = [line for line in sheet.splitlines() if line.startswith("svg ")]
    rules.append("svg .page { fill: var(--page); }")
    light, dark = (dict(re.findall(r"--(\w+): ([^;]+);", block)) for block in sheet.split(":root")[1:3])
    coloured = [
        re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], "\n".join(rules))  # noqa: B023  used at once
        for colours in (light, light | dark)
    ]
    return f"{coloured[0]}\n@media (prefers-color-scheme: dark) {{\n{coloured[1]}\n}}"
