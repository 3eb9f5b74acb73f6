"""The timelines and the bubble table in docs/pipeline.md are what the simulator says today.

python tests/test_docs_timelines.py      draws them again, and prints the table
"""

from pathlib import Path

import pytest

from headrace.pipeline.generators import generate
from headrace.pipeline.simulate import Costs, Simulation, simulate
from headrace.pipeline.timeline_svg import Panel, svg

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {"1f1b": "1F1B", "zb1p": "ZB1P", "zb_v": "ZB-V", "dualpipe": "DualPipe", "dualpipe_v": "DualPipeV"}
SIZES = [(4, 8), (16, 120)]
ALL_TO_ALL = 0.5  # of a forward, each way: together as long as its computation
ATTENTION = 0.4


def plan(name: str, ranks: int, microbatches: int, all_to_all: float) -> Simulation:
    """All schedules cut the same model, so where there are twice as many stages, each takes half as long."""
    schedule = generate(name, ranks, microbatches)
    one = ranks / schedule.stages
    way = all_to_all * one
    return simulate(schedule, Costs(one, 2 * one, one, one, dispatch=way, combine=way, attention=ATTENTION))


def drawn() -> dict[str, str]:
    """Files of docs/images by name."""
    names = {"schedules.svg": (NAMES, 0.0), "schedules-all-to-all.svg": (["1f1b", "zb_v", "dualpipe"], ALL_TO_ALL)}
    return {
        file: svg([Panel(NAMES[name], plan(name, 4, 8, all_to_all).spans) for name in chosen])
        for file, (chosen, all_to_all) in names.items()
    }


def table() -> list[str]:
    """Rows of Markdown: time of a step and idle share, bare and with an all-to-all; activations kept; buffers."""
    rows = []
    for ranks, microbatches in SIZES:
        for name, words in NAMES.items():
            bare, loaded = (plan(name, ranks, microbatches, way) for way in (0.0, ALL_TO_ALL))
            times = [f"{p.makespan:.4g} F, {sum(p.idle) / ranks / p.makespan:.1%}" for p in (bare, loaded)]
            kept = max(bare.live_activations) * ranks / generate(name, ranks, microbatches).stages
            cells = [f"{ranks}, {microbatches}", words, *times, f"{kept:g}", str(max(bare.receive_buffers))]
            rows.append(f"| {' | '.join(cells)} |".replace("%", " %"))
    return rows


@pytest.mark.parametrize("file", drawn())
def test_drawings_are_current(file: str) -> None:
    assert (DOCS / "images" / file).read_text(encoding="utf-8") == drawn()[file], "python tests/test_docs_timelines.py"


def test_the_table_is_current() -> None:
    text = (DOCS / "pipeline.md").read_text(encoding="utf-8")
    assert [row for row in table() if row not in text] == []


if __name__ == "__main__":
    for file, text in drawn().items():
        (DOCS / "images" / file).write_text(text, encoding="utf-8")
    print("\n".join(table()))
