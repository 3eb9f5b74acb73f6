"""A card's metadata, looked at before it goes anywhere: plain YAML, the fields' types, and every score as a score.

The Hub checks cards too (`/api/validate-yaml`, which huggingface_hub asks before it sends a README.md), but only over
the network and only in a push. This finds what can be known offline, in a dry run as well. Whether a licence, a
language or a task is on one of the Hub's own lists is not known here.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import ModelCardData, parse_eval_result_entries

_WORDS = re.compile(r".*\S.*", re.DOTALL)
SIZES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B"),
    *("100B<n<1T", "n>1T"),
)
"""The Hub's words for how many rows a data set has (huggingface_hub, `DatasetCardData.size_categories`)."""
_FIELDS = {  # form of the value, or of each where there may be several
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]*"),
    "license_name": re.compile(r"[a-z0-9.-]+"),
    "language": re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]+)*|code|multilingual"),
    "library_name": re.compile(r"[a-z0-9][\w.-]*"),
    "pipeline_tag": re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*"),
    "task_categories": re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*"),
    "size_categories": re.compile("|".join((*SIZES, "other"))),
    "pretty_name": _WORDS,
    "tags": _WORDS,
}
_SINGLE = {"license_name", "library_name", "pipeline_tag", "pretty_name"}
_REPOSITORY = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_REPOSITORIES = ("base_model", "datasets")


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: a few lines of them, merged into each other, grow beyond all memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse a node that stands for another one."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def front_matter_problem(text: str) -> str | None:
    """What is wrong with the metadata at the head of a card as YAML; it may have none."""
    try:
        _front_matter(text)
    except ValueError as error:
        return str(error)
    return None


def card_problem(text: str) -> str | None:
    """What is wrong with a card that is to go out: its metadata as YAML, or the first field that no reader takes."""
    try:
        metadata = _front_matter(text)
    except ValueError as error:
        return str(error)
    return next(_field_problems(metadata), None) or _scores_problem(metadata)


def eval_results_problem(text: str) -> str | None:
    """What is wrong with a file of `.eval_results/`: a list of scores, each of a task of a data set on the Hub."""
    try:
        entries = parse_eval_result_entries(_parsed(text))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"is no list of scores ({_shown(error)}); correct it"
    if not entries:
        return "holds no scores; correct it"
    for entry in entries:
        if not (_is_repository(entry.dataset_id) and isinstance(entry.task_id, str) and _is_score(entry.value)):
            return f"has a score of {_shown(entry.dataset_id)} that is no finite number, or of no data set or task"
    return None


def _front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    try:
        metadata = _parsed(found[1]) if found else {}
    except ValueError as error:
        raise ValueError(f"its metadata is {error}; correct what stands between the --- lines") from None
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no mapping of keys to values")
    return metadata


def _parsed(text: str) -> Any:
    try:
        return _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"no plain YAML ({type(error).__name__})") from None


def _field_problems(metadata: dict[str, Any]) -> Iterator[str]:
    for key, form in _FIELDS.items():
        value = metadata.get(key)
        values = value if isinstance(value, list) and key not in _SINGLE else [] if key not in metadata else [value]
        for one in values:
            if not isinstance(one, str) or not form.fullmatch(one):
                yield f"its metadata has {key}: {_shown(one)}, which no reader takes; correct it"
    if metadata.get("license") == "other" and "license_name" not in metadata:
        yield "its metadata has license: other, which needs a license_name; add it"
    for key in _REPOSITORIES:
        for one in metadata[key] if isinstance(metadata.get(key), list) else [metadata.get(key)]:
            if key in metadata and not _is_repository(one):
                yield f"its metadata has {key}: {_shown(one)}, which is no repository's name; correct it"
    if any(not isinstance(one, dict) or "config_name" not in one for one in metadata.get("configs") or []):
        yield "its metadata has configs without a config_name; correct them"


def _scores_problem(metadata: dict[str, Any]) -> str | None:
    """What is wrong with `model-index`: it must read as huggingface_hub reads it, with finite scores."""
    if "model-index" not in metadata:
        return None
    try:
        card = ModelCardData(**{"model-index": metadata["model-index"]})
        results = card.eval_results
        assert results and isinstance(card.model_name, str)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
        return "its model-index is not a model's name with results, each of a task, a data set and metrics; correct it"
    for result in results:
        named = (result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
        if not all(isinstance(name, str) and name for name in named):
            return "its model-index has a result without the name of a task, a data set or a metric; correct it"
        if not _is_score(result.metric_value):
            return f"its model-index has a {result.metric_type} that is no finite number; correct it"
    return None


def _is_repository(value: Any) -> bool:
    return isinstance(value, str) and bool(_REPOSITORY.fullmatch(value))


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return repr(str(value)[:80])
