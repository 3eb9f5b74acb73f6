"""From facts to figures: which chart shows what, with its one-sentence caption and the file it was drawn from."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from headrace.reporting.curves import Line, LineChart, draw_lines, finite, is_smoothed
from headrace.reporting.dag import draw_dag
from headrace.reporting.facts import Baseline, BitsPerByte, Estimate, Evaluation, ReportFacts, Task, Training
from headrace.reporting.heatmap import colour_limit, draw_heatmap
from headrace.reporting.quantities import duration, exact, percent, plain, tick
from headrace.reporting.svg import HALF, NARROW, WIDE
from headrace.reporting.whiskers import Row, WhiskerChart, draw_whiskers

MODEL = "this model"
BITS_AXIS = "bits per byte of held-out text, fewer is better"


@dataclass(frozen=True)
class Figure:
    """One chart at two widths, its caption, the file behind it, and its numbers for those who cannot see it."""

    wide: Markup
    narrow: Markup
    half: bool  # one of a pair on a desk
    caption: str
    source: str
    columns: tuple[str, ...] = ()
    numbers: tuple[tuple[str, ...], ...] = ()
    numbers_label: str = "First, lowest, highest and last value of each series"
    made_by: str = ""  # the command, where it is not that of the one stage whose file `source` is

    @property
    def command(self) -> str:
        """What makes the file behind it, in short; the end of the page has it in full."""
        if self.made_by:
            return self.made_by
        found = re.match(r"([a-z_]+)/[0-9a-f]{12}/", self.source)
        return f"snakemake {found[1]}" if found else ""


def source_of(facts: ReportFacts, stage: str, file: str) -> str:
    """A file of a stage's artifact, as a path under the results folder where it lies there."""
    folder = next((s.folder for s in facts.stages if s.name == stage), stage)
    return f"{folder.removeprefix(facts.results_folder).lstrip('/')}/{file}"


def dag_figure(facts: ReportFacts) -> Figure:
    """The stages with fingerprints and seconds."""
    total = sum(stage.seconds or 0.0 for stage in facts.stages)
    caption = (
        f"The {len(facts.stages)} stages in running order, their fingerprints, what each made and how long it took "
        f"({duration(total)} together); strong lines are direct inputs, thin ones are read as well."
    )
    figure = twice(lambda width: draw_dag(facts.stages, width), caption, "stage.json and manifest.json of each stage")
    return replace(figure, made_by=facts.command)


def loss_figure(training: Training, source: str) -> Figure | None:
    """Training, validation and MTP loss."""
    lines = (
        Line("train", training.curves.get("train", ()), 1, noisy=True),
        Line("validation", training.curves.get("validation", ()), 2, dots=True),
        Line("MTP", training.curves.get("mtp", ()), 3, noisy=True),
    )
    strokes = "faint as logged, strong as a running mean; " if any(map(is_smoothed, lines)) else ""
    caption = f"Loss per token over training tokens; {strokes}validation is measured on text that is not trained on"
    return curve(LineChart("Loss over training tokens", "loss, nats per token", lines, height=330), caption, source)


def expert_figures(training: Training, source: str) -> list[Figure]:
    """The load heat map and MaxVio."""
    load = training.expert_load
    figures = []
    if load is not None and load.layers and load.tokens:
        caption = (
            "Share of tokens that each expert received, relative to its layer's mean, over training tokens: "
            "no colour is balanced, blue is starved, orange is crowded "
            f"(full at {plain(colour_limit(load), 2)} times the mean)."
        )
        figures.append(twice(lambda width: draw_heatmap(load, width), caption, source))
    if load is not None and load.max_violation:
        lines = (Line("MaxVio", load.max_violation, 1, noisy=True),)
        chart = LineChart("MaxVio over training tokens", "MaxVio", lines, zero=True, height=220)
        caption = (
            "MaxVio, the excess of the most loaded expert over the mean (averaged over layers), over training tokens; "
            "0 is perfect balance"
        )
        figure = curve(chart, caption, source)
        figures += [figure] if figure else []
    return figures


def throughput_figures(training: Training, source: str) -> list[Figure]:
    """Tokens per second and MFU."""

    def chart(label: str, y_title: str, name: str, tone: int, write: Callable[[float], str]) -> LineChart:
        line = Line(label, training.curves.get(name, ()), tone, noisy=True)
        return LineChart(label, y_title, (line,), zero=True, height=220, half=True, write_y=write)

    speed = chart("tokens per second", "tokens per second", "tokens_per_second", 1, tick)
    use = chart("model FLOPs utilisation", "MFU, share of the GEMM peak", "mfu", 3, percent)
    peak = f" of {plain(training.gemm_peak_flops / 1e9)} GFLOP/s" if training.gemm_peak_flops else ""
    figures = (
        curve(speed, "Tokens per second over training tokens", source),
        curve(
            use,
            f"Model FLOPs utilisation over training tokens, against the GEMM peak{peak} measured at the start",
            source,
        ),
    )
    return [figure for figure in figures if figure is not None]


def gradient_figure(training: Training, source: str) -> Figure | None:
    """Gradient norm before clipping."""
    lines = (Line("gradient norm", training.curves.get("gradient_norm", ()), 1, noisy=True),)
    chart = LineChart("Gradient norm", "global gradient norm", lines, logarithmic=None, height=220)
    return curve(chart, "Global norm of the gradient before clipping, over training tokens", source)


def standing_figure(score: BitsPerByte, source: str) -> Figure:
    """The headline: the model among its baselines on all held-out text, best at the top."""
    names = tuple(score.baselines)
    placed = [(score.model.value, Row(MODEL, score.model))]
    placed += [(other.value, Row(name, None, ((name, other.value),))) for name, other in score.baselines.items()]
    rows = tuple(row for _, row in sorted(placed, key=lambda pair: pair[0]))
    chart = WhiskerChart("Bits per byte of this model and of its baselines", BITS_AXIS,
                         rows, names)  # fmt: skip
    caption = (
        f"Bits per byte on {exact(score.documents)} held-out documents: the model with its 95 % interval "
        "(bootstrap over documents) among models estimated on the same training text, and the compressor xz, whose "
        "figure is one number over all the text."
    )
    return twice(lambda width: draw_whiskers(chart, width), caption, source)


def kinds_figure(evaluation: Evaluation, source: str) -> Figure | None:
    """Bits per byte by kind of text."""
    scores = evaluation.bits_per_byte
    if not scores:
        return None
    names = tuple(dict.fromkeys(name for score in scores for name in score.baselines))
    rows = tuple(
        Row(score.kind, score.model, tuple((name, other.value) for name, other in score.baselines.items()))
        for score in scores
    )
    chart = WhiskerChart("Bits per byte by kind of text", BITS_AXIS, rows, names)
    caption = (
        "Bits per byte by kind of held-out text, with 95 % intervals from a bootstrap over documents, "
        "beside the baselines on the same text."
    )
    return twice(lambda width: draw_whiskers(chart, width), caption, source)


def task_figures(evaluation: Evaluation, source: str) -> list[Figure]:
    """One chart per metric, since metrics do not share an axis."""
    by_metric: dict[str, list[Task]] = {}
    for task in evaluation.tasks:
        by_metric.setdefault(task.metric, []).append(task)
    return [_tasks(metric, tasks, source) for metric, tasks in by_metric.items()]


def _tasks(metric: str, tasks: Sequence[Task], source: str) -> Figure:
    rows = tuple(Row(t.name, t.score, () if t.chance is None else (("chance", t.chance),)) for t in tasks)
    names = ("chance",) if any(task.chance is not None for task in tasks) else ()
    better = (
        "more is better" if tasks[0].higher_is_better else "fewer is better" if "bits" in metric else "less is better"
    )
    chart = WhiskerChart(f"Task scores: {metric}", f"{metric}, {better}", rows, names, (4,), domain=_unit_domain(tasks))
    against = ", beside the level of chance" if names else ""
    caption = f"Task scores as {metric} with 95 % intervals{against}."
    return twice(lambda width: draw_whiskers(chart, width), caption, source)


def _unit_domain(tasks: Sequence[Task]) -> tuple[float, float] | None:
    """Shares are shown from 0 to 1 where they fill it, so that small differences do not look large."""
    if any(task.chance is None for task in tasks):
        return None
    top = max(max(t.score.value, t.score.high or 0.0, t.chance or 0.0) for t in tasks)
    return (0.0, 1.0 if top > 0.5 else 0.5 if top > 0.25 else 0.25)


def standing(model: Estimate, baseline: Baseline) -> int:
    """1: the model is better, -1: worse, 0: not told apart, as where there is no interval to tell by.

    The interval is that of the paired difference, or the model's own where the baseline has no pairs (xz).
    """
    apart = baseline.difference
    if apart is None and model.low is not None and model.high is not None:
        apart = Estimate(0.0, model.low - baseline.value, model.high - baseline.value)
    if apart is None or apart.low is None or apart.high is None:
        return 0
    return 1 if apart.high < 0 else -1 if apart.low > 0 else 0


def verdict(model: Estimate, baselines: Mapping[str, Baseline]) -> str:
    """Which baselines the model clears, in words."""
    groups = {"fewer bits than": 1, "more bits than": -1, "not told apart from": 0}
    found = {name: standing(model, other) for name, other in baselines.items()}
    parts = {words: [name for name, place in found.items() if place == wanted] for words, wanted in groups.items()}
    return "; ".join(f"{words} {_list(names)}" for words, names in parts.items() if names)


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def curve(chart: LineChart, caption: str, source: str) -> Figure | None:
    """None where there is not one finite point; otherwise what could not be drawn is said in the caption."""
    drawn = [line for line in chart.lines if finite(line.points)]
    if not drawn:
        return None
    lost = sum(len(line.points) - len(finite(line.points)) for line in chart.lines)
    note = f"; {lost} values were not finite and are not drawn." if lost else "."
    numbers = tuple(_summary(line, chart.write_y) for line in drawn if line.label)
    columns = ("series", "points", "first", "lowest", "highest", "last")
    return twice(lambda width: draw_lines(chart, width), caption + note, source, columns, numbers, half=chart.half)


def _summary(line: Line, write: Callable[[float], str]) -> tuple[str, ...]:
    values = [y for _, y in finite(line.points)]
    return (line.label, exact(len(values)), *(write(v) for v in (values[0], min(values), max(values), values[-1])))


def twice(
    draw: Callable[[float], Markup],
    caption: str,
    source: str,
    columns: tuple[str, ...] = (),
    numbers: tuple[tuple[str, ...], ...] = (),
    *,
    half: bool = False,
) -> Figure:
    """A chart at the page's widths."""
    return Figure(draw(HALF if half else WIDE), draw(NARROW), half, caption, source, columns, numbers)
