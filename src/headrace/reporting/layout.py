"""One training step on several pipeline ranks, planned above measured: a section of the report.

Runs in one process, and those that spread over data ranks only, have no such section: nobody waits for a stage there.
The drawing is the pipeline's own (`pipeline/timeline_svg.py`), on one scale for both, so equal lengths are equal times.
"""

from typing import Any

from markupsafe import Markup

from headrace.pipeline.schedule import Action
from headrace.pipeline.timeline import Span
from headrace.pipeline.timeline_svg import Panel, svg
from headrace.reporting.facts import PipelineStep
from headrace.reporting.figures import Figure, twice
from headrace.reporting.quantities import exact, fixed

NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
MOST_COLLECTIVES = 600
"""More than these are left out of the drawing: they would be thinner than a pixel and the page megabytes larger."""


def section(step: PipelineStep, source: str) -> dict[str, Any]:
    """All that the template of the section needs."""
    ranks = range(step.pipeline)
    held = _stages_by_rank(step)
    return {
        "step": step,
        "figure": figure(step, source),
        "stages": len(step.layers),
        "reason": step.reason.rstrip("."),
        "lessons": lessons(step),
        "rows": [
            (
                f"rank{NO_BREAK_SPACE}{rank}",
                ", ".join(f"{stage} ({_layers(step.layers[stage])})" for stage in held[rank]),
                _share(step.planned.idle[rank]),
                _share(step.measured.idle[rank]),
                step.live_activations[rank],
                step.receive_buffers[rank],
            )
            for rank in ranks
        ],
        "idle": tuple(_share(sum(part.idle) / len(part.idle)) for part in (step.planned, step.measured)),
    }


def figure(step: PipelineStep, source: str) -> Figure:
    """Both timelines at the page's widths."""
    collectives = _drawn(step)
    left_out = len(step.measured.collectives) - len(collectives)
    longest = max(span.end for span in (*step.planned.spans, *step.measured.spans))
    unit, scale = ("s", 1) if longest >= 5 else ("ms", 1000)
    panels = (
        Panel("planned", step.planned.spans),
        Panel("measured", (*step.measured.spans, *collectives)),
    )
    caption = (
        f"Step {step.step} on one scale of time. Planned: the schedule's actions in their order, each as long as this "
        "step's mean of its kind and stage. Measured: what the ranks did. Numbers are microbatches, gaps are idle time"
        f"{f'; {exact(left_out)} collectives are not drawn' if left_out else ''}."
    )

    def draw(width: float) -> Markup:
        return Markup(svg(panels, unit, scale, width))  # noqa: S704  it escapes the names of actions

    return twice(draw, caption, source)


def lessons(step: PipelineStep) -> list[str]:
    """What the drawing shows, and what it cannot show here: a paragraph each."""
    seen = (
        "Both timelines hold the same work. The plan's gaps are the schedule's own; the two differ by what it leaves "
        "out: transfers between ranks, and actions of one kind that take longer at one time than at another."
    )
    if step.expert > 1:
        strips = "The thin strips are the all-to-all between experts, from its start to the end of the wait for it. "
        hidden = (
            f"{strips if _drawn(step) else ''}DualPipe's overlapped pairs run the all-to-all under the "
            "other microbatch's computation; that is its case."
        )
    else:
        hidden = (
            "Each data rank has all experts here, so there is no all-to-all. Hiding it under another microbatch's "
            "computation is DualPipe's case."
        )
    if step.device == "cpu":
        hidden += (
            " What that is worth, CPU processes of one machine cannot show, as they exchange data through memory: "
            "without communication to hide, DualPipeV idles more than ZB-V."
        )
    return [seen, hidden]


def _drawn(step: PipelineStep) -> tuple[Span, ...]:
    return step.measured.collectives if len(step.measured.collectives) <= MOST_COLLECTIVES else ()


def _stages_by_rank(step: PipelineStep) -> list[list[int]]:
    """The stages that a rank runs, ascending; in DualPipe each lies on two ranks."""
    held: list[set[int]] = [set() for _ in range(step.pipeline)]
    for span in step.planned.spans:
        held[span.rank] |= {part.stage for part in Action.parse(span.action).computations}
    return [sorted(stages) for stages in held]


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _share(value: float) -> str:
    return f"{fixed(100 * value, 1)}{NO_BREAK_SPACE}%"
