"""The section of a pipelined step: there only where there is one, complete, and honest about what it cannot show."""

import re
from dataclasses import replace

import pytest

from headrace.pipeline.generators import generate
from headrace.pipeline.simulate import Costs, simulate
from headrace.reporting.facts import PipelineStep, ReportFacts, StepTimeline
from headrace.reporting.layout import MOST_COLLECTIVES, lessons, section
from headrace.reporting.page import render


def page(facts: ReportFacts, step: PipelineStep | None) -> str:
    assert facts.training is not None
    return render(replace(facts, training=replace(facts.training, pipeline_step=step)))


def test_one_pipeline_rank_has_no_section(demo_facts: ReportFacts) -> None:
    assert "layout" not in re.findall('id="([a-z-]+)"', page(demo_facts, None))
    assert "Pipeline step" not in page(demo_facts, None)


def test_the_section_says_what_ran_and_why(demo_facts: ReportFacts, demo_step: PipelineStep) -> None:
    html = page(demo_facts, demo_step)
    part = html[html.index('<section id="layout"') : html.index('<section id="formats"')]
    text = " ".join(re.sub("<style>.*?</style>|<[^>]*>", " ", part, flags=re.S).replace("\xa0", " ").split())
    for words in (
        "4 layers are cut into 4 pipeline stages",
        "Schedule dualpipe: it hides the communication of a forward under a backward, and the other way round. ",
        "pipeline 4 × data 2, experts over 2 by deepep 1.2.1",
        "planned 7.7 %",  # 2 of 26
        "rank 0 0 (1 layer), 3 (1 layer) 7.7 %",
        "rank 1 1 (2 layers), 2 (0 layers) 7.7 %",
        "artifact/timeline.json",
    ):
        assert words in text, words
    assert 'href="#layout"' in html


def test_both_timelines_are_drawn_on_one_scale(demo_step: PipelineStep) -> None:
    drawn = section(demo_step, "timeline.json")["figure"]
    assert re.findall(r'class="title">([a-z]+) · ([0-9]+)', drawn.wide) == [
        ("planned", "260"),
        ("measured", "311"),
    ]  # 1.2 * 250 + 11
    count = len(demo_step.planned.spans)
    assert drawn.wide.count("<g>") == drawn.narrow.count("<g>") == 3 * count  # one collective for each measured action


def test_too_many_collectives_are_counted_and_not_drawn(demo_step: PipelineStep) -> None:
    some = demo_step.measured.collectives
    many = (some * MOST_COLLECTIVES)[: MOST_COLLECTIVES + 1]
    step = replace(demo_step, measured=replace(demo_step.measured, collectives=many))
    drawn = section(step, "x")["figure"]
    assert "thin strips" not in " ".join(lessons(step))
    assert f"; {MOST_COLLECTIVES + 1} collectives are not drawn." in drawn.caption
    assert drawn.wide.count("<g>") == 2 * len(demo_step.planned.spans)
    assert "not drawn" not in section(demo_step, "x")["figure"].caption


@pytest.mark.parametrize(("device", "said"), [("cpu", True), ("cuda", False)])
def test_what_a_cpu_cannot_show_is_said_there(demo_step: PipelineStep, device: str, said: bool) -> None:
    words = " ".join(lessons(replace(demo_step, device=device)))
    assert ("DualPipeV idles more than ZB-V" in words) == said
    assert "thin strips" in words
    assert "there is no all-to-all" in " ".join(lessons(replace(demo_step, expert=1)))


def test_and_it_is_true() -> None:
    idle = {name: sum(simulate(generate(name, 4, 12), Costs()).idle) for name in ("dualpipe_v", "zb_v")}
    assert idle["dualpipe_v"] > idle["zb_v"]


def test_the_published_layout_makes_a_page_that_opens(demo_facts: ReportFacts, demo_step: PipelineStep) -> None:
    simulation = simulate(generate("dualpipe", 16, 120), Costs(0.3, 0.6, 0.3, 0.3))
    one = StepTimeline(simulation.spans, (0.037,) * 16)
    large = replace(
        demo_step,
        pipeline=16,
        layers=(4,) * 16,
        live_activations=simulation.live_activations,
        receive_buffers=simulation.receive_buffers,
        planned=one,
        measured=one,
    )
    html = page(demo_facts, large)
    assert len(html) - len(page(demo_facts, None)) < 2_000_000
    assert 'class="title">planned · 112.2 s<' in html  # 374 forwards of 0.3 s
