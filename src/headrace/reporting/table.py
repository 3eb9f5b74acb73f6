"""The closing table on the terminal: what came of the run and where it lies, in plain text of at most 100 columns."""

from headrace.reporting.facts import Baseline, Estimate, ReportFacts
from headrace.reporting.figures import standing
from headrace.reporting.page import headline_score
from headrace.reporting.quantities import duration, fixed, interval, percent, short, size

WIDTH = 100
Section = list[tuple[str, str]]


def summary_table(facts: ReportFacts) -> str:
    """Loss, bits per byte against baselines, sizes, folders, the report's path; parts that are missing are left out."""
    sections = [section for section in (_trained(facts), _held_out(facts), _places(facts)) if section]
    left = max(len(name) for section in sections for name, _ in section)
    rule = "\N{BOX DRAWINGS LIGHT HORIZONTAL}" * WIDTH
    lines = [_clip(facts.title, WIDTH), rule]
    for section in sections:
        for name, value in section:
            lines += _wrap(f"{name:<{left}}  ", value)
        lines.append(rule)
    return "\n".join(line.rstrip() for line in lines)


def _trained(facts: ReportFacts) -> Section:
    training = facts.training
    if training is None:
        return []
    use = f", MFU {percent(training.mfu)}" if training.mfu is not None else ""
    took = f"{short(training.tokens)} tokens in {duration(training.seconds)}"
    rows = [
        ("parameters", f"{short(training.parameters)}, {short(training.parameters_activated)} activated per token"),
        ("trained on", f"{took}, {short(training.tokens_per_second)} tokens/s{use}"),
    ]
    validation = f", validation {fixed(training.loss_validation)}" if training.loss_validation is not None else ""
    return [*rows, ("loss", f"train {fixed(training.loss_train)}{validation} nats per token")]


def _held_out(facts: ReportFacts) -> Section:
    """Bits per byte: the model first, then each baseline with how far the model is from it."""
    score = headline_score(facts)
    if score is None:
        return []
    model = score.model
    rows = [("bits per byte", f"{fixed(model.value)}  {interval(model.low, model.high)}  held-out text, 95 % interval")]
    for name, baseline in score.baselines.items():
        rows.append((f"  {name}", f"{fixed(baseline.value)}  {_standing(model, baseline)}"))
    return rows


def _standing(model: Estimate, baseline: Baseline) -> str:
    """Better or worse only where the interval says so, as on the page."""
    place = standing(model, baseline)
    gap = fixed(abs(baseline.value - model.value))
    return "not told apart" if place == 0 else f"the model is {'better' if place > 0 else 'worse'} by {gap}"


def _places(facts: ReportFacts) -> Section:
    rows: Section = []
    if facts.publication is not None:
        published = facts.publication
        rows.append(("model", f"{published.format}, {size(published.size_bytes)}"))
        if published.repository:
            rows.append(("published", f"{published.repository} at {published.tag or published.commit}"))
        else:
            rows.append(("not published", published.folder))
    rows += [("results", facts.results_folder), ("report", facts.report_path)]
    return rows


def _wrap(head: str, value: str) -> list[str]:
    """Paths are cut into lines rather than shortened, since they are there to be copied."""
    room = WIDTH - len(head)
    pieces = [value[i : i + room] for i in range(0, len(value), room)] or [""]
    return [(head if i == 0 else " " * len(head)) + piece for i, piece in enumerate(pieces)]


def _clip(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"
