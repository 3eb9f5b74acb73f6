"""`report.html`, and a precision study or a comparison as a page of its own: one file, no script, no request anywhere.

The templates and the style sheet lie beside this module. Jinja escapes all text, figures are built of escaped parts,
and a content security policy forbids every load but embedded images: text that slipped through would fetch nothing.
"""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from headrace.artifacts.files import write_atomic
from headrace.reporting import comparison, data, figures, layout, precision, quantities, recipe, reliability
from headrace.reporting.facts import BitsPerByte, Comparison, Estimate, PrecisionStudy, ReportFacts
from headrace.reporting.quantities import plain

_HERE = Path(__file__).parent
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
_BEGIN, _END = "<!--comparisons-->", "<!--/comparisons-->"
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Classes of the characters that turn the direction of writing (Unicode Standard Annex 9)."""


def render(facts: ReportFacts) -> str:
    """The whole page as HTML; equal facts give equal text."""
    return _template("report.html.j2").render(facts=facts, style=_style(), **_context(facts))


def write_report(facts: ReportFacts, path: Path) -> None:
    """Render and publish the page atomically; characters that UTF-8 cannot hold become '?'."""
    _write(render(facts), path)


def with_comparisons(page: str, found: Sequence[Comparison]) -> str:
    """A rendered report with the comparisons that its run takes part in instead of those that it shows.

    They are made when the report is long finished, and it is a function of its stages alone: so they are laid into the
    copy that people open. A page of an older version, which has no place for them, stays as it is.
    """
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    if not after:
        return page
    shown = [comparison.section(each) for each in found]
    return before + _BEGIN + _template("comparison_section.html.j2").render(comparisons=shown) + _END + after


def write_study(study: PrecisionStudy, path: Path) -> None:
    """The precision study alone, as a page of its own."""
    shown = precision.section(study)
    _write_alone(f"{shown['name']} · Headrace precision study", "precision_section.html.j2", path, precision=shown)


def write_comparison(found: Comparison, path: Path) -> None:
    """A comparison of runs alone, as a page of its own."""
    shown = [comparison.section(found)]
    _write_alone("Headrace: runs compared", "comparison_section.html.j2", path, comparisons=shown)


def _write_alone(title: str, section: str, path: Path, **context: Any) -> None:
    _write(_template("alone.html.j2").render(title=title, section=section, style=_style(), **context), path)


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        exact=quantities.exact, short=quantities.short, size=_unbroken(quantities.size), plain=quantities.plain,
        percent=_unbroken(quantities.percent), duration=_unbroken(quantities.duration), fixed=quantities.fixed,
        visible=visible, written=_written,
    )  # fmt: skip
    environment.globals["interval"] = _unbroken(quantities.interval)
    environment.globals["shift"] = _unbroken(_shift)
    return environment.get_template(name)


def _style() -> Markup:
    return Markup((_HERE / "report.css").read_text(encoding="utf-8"))  # noqa: S704  our own file


def _write(html: str, path: Path) -> None:
    write_atomic(path, html.encode("utf-8", "replace"))


def visible(text: str) -> str:
    """Control characters as their pictures or numbers, so that they are seen and do nothing; newline and tab stay.

    Those that turn the direction of writing are among them: with them, code reads otherwise than it runs.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if code < 32 and character not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    turns = unicodedata.bidirectional(character) in _TURNS
    return f"\u27e8U+{code:04X}\u27e9" if turns or 0x80 <= code < 0xA0 else character


def headline_score(facts: ReportFacts) -> BitsPerByte | None:
    """Bits per byte over all held-out text."""
    scores = facts.evaluation.bits_per_byte if facts.evaluation else ()
    return next((score for score in scores if score.kind == "all"), None)


def _context(facts: ReportFacts) -> dict[str, Any]:
    training, evaluation, score = facts.training, facts.evaluation, headline_score(facts)
    log, loads, timeline = (
        figures.source_of(facts, "pretrain", file) for file in ("metrics.jsonl", "expert_load.json", "timeline.json")
    )
    results = figures.source_of(facts, "evaluate", "results.json")
    ledger = figures.source_of(facts, "pretrain", reliability.RELIABILITY)
    text, tokens = figures.source_of(facts, "corpus", data.CORPUS), figures.source_of(facts, "tokenize", data.DATASET)
    return {
        "data": data.section(facts.data, text, tokens) if facts.data else None,
        "score": score,
        "verdict": figures.verdict(score.model, score.baselines).replace("xz ", f"xz{NO_BREAK_SPACE}") if score else "",
        "seconds": sum(stage.seconds or 0.0 for stage in facts.stages),
        "standing": figures.standing_figure(score, results) if score else None,
        "dag": figures.dag_figure(facts),
        "loss": figures.loss_figure(training, log) if training else None,
        "schedules": recipe.section(training.plan, figures.source_of(facts, "pretrain", recipe.DATA))
        if training
        else None,
        "experts": figures.expert_figures(training, loads) if training else [],
        "throughput": figures.throughput_figures(training, log) if training else [],
        "layout": layout.section(training.pipeline_step, timeline) if training and training.pipeline_step else None,
        "reliability": reliability.section(facts.reliability, ledger) if facts.reliability else None,
        "gradient": figures.gradient_figure(training, log) if training else None,
        "precision": precision.section(facts.study) if facts.study else None,
        "kinds": figures.kinds_figure(evaluation, results) if evaluation else None,
        "tasks": figures.task_figures(evaluation, results) if evaluation else [],
        "contaminated": data.contaminated(facts.data, facts.weights_from),
        "commands": _commands(facts),
        "baselines": _baseline_names(facts),
        "paired": (paired := _paired_names(facts)),
        "unpaired": [name for name in _baseline_names(facts) if name not in paired],
        "paired_columns": [(f"minus {name}", True) for name in paired],
        "baseline_columns": [(name, True) for name in _baseline_names(facts)],
        "groups": {name: _yaml(tree) for name, tree in facts.config.items()},
    }


def _commands(facts: ReportFacts) -> list[tuple[str, str]]:
    """Every stage and the command that makes it alone, after what it needs."""
    program, settings = facts.command.partition(" ")[::2]
    return [(stage.name, f"{program} {stage.name} {settings}".strip()) for stage in facts.stages]


def _baseline_names(facts: ReportFacts) -> list[str]:
    scores = facts.evaluation.bits_per_byte if facts.evaluation else ()
    return list(dict.fromkeys(name for score in scores for name in score.baselines))


def _paired_names(facts: ReportFacts) -> list[str]:
    """Baselines that were compared document by document."""
    scores = facts.evaluation.bits_per_byte if facts.evaluation else ()
    return list(dict.fromkeys(name for score in scores for name, other in score.baselines.items() if other.difference))


def _shift(value: Estimate) -> str:
    """In as many digits as it is certain to: shifts are of the order of 1e-8 as well as of 0.01."""
    bounds = "" if value.low is None or value.high is None else f" [{plain(value.low, 2)}, {plain(value.high, 2)}]"
    return plain(value.value, 2) + bounds


def _unbroken(write: Callable[..., str]) -> Callable[..., str]:
    """The same words with spaces that do not break a line."""
    return lambda *values: write(*values).replace(" ", NO_BREAK_SPACE)


def _yaml(tree: Any) -> str:
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)).removesuffix("...\n").rstrip("\n")


def _written(value: Any) -> str:
    """A configuration value on one line, as YAML writes it."""
    return (
        str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6))
        .removesuffix("...\n")
        .strip()
    )
