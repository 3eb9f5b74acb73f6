"""The texts of all items that an evaluation asks, for the search for them in training text.

An item's text is what is particular to it: its question as the task words it, and its right answer, without shots and
without a task's general instructions. All items of a task are taken, whatever `evaluate.items` says.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.config.schema import EvaluateConfig
from headrace.corpus.contamination import Item
from headrace.evaluation.harness import quiet
from headrace.evaluation.hub_tasks import ROOT, LoadedTask, load
from headrace.evaluation.items import texts_of


def item_texts(config: EvaluateConfig, root: Path = ROOT) -> tuple[list[Item], dict[str, str]]:
    """Items of `evaluate.tasks` and `evaluate.harness`; and by name, why there are none of the other tasks.

    Raises `UserError` as `hub_tasks.load` does.
    """
    loaded, absent = load(config.harness, config.without_network, root)
    items = [Item(id_, text) for task in config.tasks for id_, text in texts_of(task)]
    with quiet():
        items += _harness_items(loaded)
    present = {item.id.partition("/")[0] for item in items}
    return items, {**{task: "made from a seed" for task in config.tasks if task not in present}, **absent}


def _harness_items(loaded: Sequence[LoadedTask]) -> Iterator[Item]:
    for task in loaded:
        for name, leaf in task.leaves.items():
            for number, document in enumerate(leaf.eval_docs):
                yield Item(f"{task.config.task}/{name}/{number}", _text(leaf, document))


def _text(leaf: Any, document: Any) -> str:
    """Question and right answer; where the choices are questions to one answer, the right question."""
    question, answer = leaf.doc_to_text(document), leaf.doc_to_target(document)
    choices = leaf.doc_to_choice(document) if leaf.OUTPUT_TYPE == "multiple_choice" else []
    parts = [_chosen(question, choices), *(_chosen(each, choices) for each in _several(answer))]
    return " ".join(parts)


def _several(answer: Any) -> Sequence[Any]:
    return answer if isinstance(answer, (list, tuple)) else [answer]


def _chosen(value: Any, choices: Sequence[str]) -> str:
    return str(choices[value]) if isinstance(value, int) and 0 <= value < len(choices) else str(value)
