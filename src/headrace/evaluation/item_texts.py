"""The texts of all items that an evaluation asks, for the search for them in training text.

An item's text is what is particular to it: its question as the task words it, without the words that all of the task's
questions begin or end with, and its right answer; of a generated puzzle, see `puzzle_texts`. All items of a task are
taken, whatever `evaluate.items` says. A task that runs code is never loaded; what its data say is read by itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

from headrace.config.schema import EvaluateConfig, HarnessTask
from headrace.corpus.contamination import Item
from headrace.errors import UserError
from headrace.evaluation import hub_tasks
from headrace.evaluation.harness import quiet
from headrace.evaluation.hub_tasks import ROOT, UNSAFE, LoadedTask, definitions, load
from headrace.evaluation.items import texts_of
from headrace.evaluation.puzzle_texts import shared_ends

_CODE_FIELDS = ("text", "prompt", "code", "canonical_solution", "input", "output")
"""What MBPP, HumanEval and CRUXEval call question, solution, and what a function is given and returns."""


def item_texts(config: EvaluateConfig, root: Path = ROOT) -> tuple[list[Item], dict[str, str]]:
    """Items of `evaluate.tasks` and `evaluate.harness`; and by name, why there are none of the other tasks.

    Raises `UserError` as `hub_tasks.load` does.
    """
    loaded, absent = load(config.harness, config.without_network, root)
    items = [Item(id_, text) for task in config.tasks for id_, text in texts_of(task)]
    with quiet():
        items += _harness_items(loaded)
    for task in [task for task in config.harness if absent.get(task.task) == UNSAFE]:
        try:
            if found := _code_items(task, root):
                items += found
                del absent[task.task]
        except Exception as error:  # whatever the data's readers raise
            reason = f"its data cannot be had: {' '.join(str(error).split())[:200]}"
            if config.without_network == "refuse":
                raise UserError(
                    f"evaluate.harness: {task.task}: {reason}; leave it out or set evaluate.without_network=skip"
                ) from None
            absent[task.task] = reason
    return items, absent


def _harness_items(loaded: Sequence[LoadedTask]) -> Iterator[Item]:
    for task in loaded:
        for name, leaf in task.leaves.items():
            documents = list(leaf.eval_docs)
            questions = _without_what_all_say([_question(leaf, document) for document in documents])
            for number, (question, document) in enumerate(zip(questions, documents, strict=True)):
                yield Item(f"{task.config.task}/{name}/{number}", f"{question} {_answer(leaf, document)}")


def _code_items(task: HarnessTask, root: Path) -> list[Item]:
    if not hub_tasks.reachable():
        raise ConnectionError("the Hub cannot be reached")
    items = []
    for leaf in definitions(task, root):
        name, options = leaf.get("dataset_name"), leaf.get("dataset_kwargs") or {}
        with quiet():
            rows = load_dataset(leaf["dataset_path"], name, split=leaf["test_split"], **options)
        for number, row in enumerate(rows):
            text = " ".join(str(row[field]) for field in _CODE_FIELDS if field in row)
            items += [Item(f"{task.task}/{leaf['task']}/{number}", text)] if text else []
    return items


def _question(leaf: Any, document: Any) -> list[str]:
    """The words of an item's question; where the choices are questions to one answer, of the right one."""
    return _chosen(leaf.doc_to_text(document), _choices(leaf, document)).split()


def _answer(leaf: Any, document: Any) -> str:
    """The right answer; the first of several, which a text need not all hold."""
    answer = leaf.doc_to_target(document)
    first = (answer[0] if answer else "") if isinstance(answer, (list, tuple)) else answer
    return _chosen(first, _choices(leaf, document)).strip()


def _choices(leaf: Any, document: Any) -> Sequence[str]:
    return leaf.doc_to_choice(document) if leaf.OUTPUT_TYPE == "multiple_choice" else []


def _chosen(value: Any, choices: Sequence[str]) -> str:
    return str(choices[value]) if isinstance(value, int) and 0 <= value < len(choices) else str(value)


def _without_what_all_say(questions: Sequence[Sequence[str]]) -> list[str]:
    """Each question without the words that all of a task's questions begin and end with: they are its template."""
    if len(questions) < 2:
        return [" ".join(words) for words in questions]
    begin, end = shared_ends(questions)
    return [" ".join(words[begin : len(words) - end]) for words in questions]
