"""The model card: README.md from computed facts, with the metadata that the Hub reads.

Every value that the template prints is escaped unless a filter made it (`finalize`), so a title or a source's name can
neither break a table nor bring in HTML, links or front matter. Scores go into the card's table, its `model-index` and
`.eval_results/*.yaml` from the same `Measurement`s.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from headrace.publication.facts import CardFacts, Measurement

_TAGS = ("headrace", "deepseek_v3", "moe")
_FORMATS = {"fp8": "FP8: E4M3 in blocks of 128 x 128 with FP32 scales, the rest in BF16"}


class _Markdown(str):
    """Text that is Markdown already."""


def render(facts: CardFacts) -> str:
    """README.md: metadata between `---` lines, then the card."""
    baselines = list(dict.fromkeys(name for m in facts.measurements for name in m.baselines))
    derived = {"baselines": baselines, "source": facts.repo_id or "path/to/this/folder"}
    values = vars(facts) | derived | {"format": _FORMATS.get(facts.dtype, facts.dtype)}
    return filled("card.md.jinja", metadata(facts), values)


def filled(name: str, head: CardData, values: Mapping[str, Any]) -> str:
    """A template of this room with its values, below its metadata."""
    environment = jinja2.Environment(
        finalize=_escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 (Markdown; `finalize` escapes)
    )
    environment.filters |= {"count": _count, "number": _number, "duration": _duration}
    environment.filters |= {"code": _code, "literal": _literal, "block": _block}
    template = environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return f"---\n{head.to_yaml()}\n---\n{template.render(values).rstrip()}\n"


def metadata(facts: CardFacts) -> ModelCardData:
    """The card's metadata, with the scores as `model-index`."""
    return ModelCardData(
        license=facts.license.lower(),
        license_name="see-training-data" if facts.license == "other" else None,
        language=list(facts.languages) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=facts.origin.partition("@")[0] if facts.origin and "/" in facts.origin else None,
        tags=[*_TAGS, *(["fp8"] if facts.dtype == "fp8" else []), *facts.tags],
        model_name=facts.title,
        eval_results=[_eval_result(m) for m in facts.measurements] or None,
    )


def eval_result_files(facts: CardFacts) -> dict[str, str]:
    """`.eval_results/*.yaml` by name, one per data set that the Hub knows; others are in `model-index` only."""
    groups: dict[str, list[Measurement]] = {}
    for measurement in facts.measurements:
        if measurement.dataset_id is not None:
            groups.setdefault(measurement.dataset_id, []).append(measurement)
    return {f"{_slug(name)}.yaml": _entries_yaml(name, group) for name, group in groups.items()}


def _eval_result(measurement: Measurement) -> EvalResult:
    interval = {} if measurement.low is None else {"interval_95": [measurement.low, measurement.high]}
    return EvalResult(
        task_type="text-generation",
        task_name=measurement.task,
        dataset_type=measurement.dataset_id or _slug(measurement.dataset),
        dataset_name=measurement.dataset,
        metric_type=measurement.metric,
        metric_name=measurement.metric,
        metric_value=measurement.value,
        metric_args={"items": measurement.items, **interval},
    )


def _entries_yaml(dataset_id: str, measurements: Sequence[Measurement]) -> str:
    entries = [
        EvalResultEntry(
            dataset_id=dataset_id, task_id=_slug(m.task), value=m.value, notes=f"{m.metric}, {m.items} items"
        )
        for m in measurements
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


def _escape(value: Any) -> Any:
    """Free text as literal Markdown on one line."""
    if isinstance(value, _Markdown):
        return value
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>()#!|~])", r"\\\1", line).replace("&", "&amp;").replace("\\<", "&lt;")


def _code(value: Any) -> _Markdown:
    text = json.dumps(value) if not isinstance(value, str) else value
    return _Markdown("`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`")


def _literal(value: str) -> _Markdown:
    return _Markdown(json.dumps(value))


def _block(text: str, language: str) -> _Markdown:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Markdown(f"{fence}{language}\n{text.strip()}\n{fence}")


def _count(value: int) -> _Markdown:
    return _Markdown(f"{value:,}")


def _number(value: float) -> _Markdown:
    return _Markdown(f"{value:.4g}")


def _duration(seconds: float) -> _Markdown:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return _Markdown(f"{seconds / length:.1f} {unit}")
    return _Markdown(f"{seconds:.0f} s")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "unnamed"
