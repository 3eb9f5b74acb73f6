"""What of a task's items is sought in training text: no template, and one right answer."""

from types import SimpleNamespace
from typing import Any

from headrace.config.schema import HarnessTask
from headrace.evaluation.hub_tasks import LoadedTask
from headrace.evaluation.item_texts import _harness_items


def texts_of(kind: str, documents: list[Any], text: Any, target: Any, choices: Any = None) -> dict[str, str]:
    leaf = SimpleNamespace(
        OUTPUT_TYPE=kind, eval_docs=documents, doc_to_text=text, doc_to_target=target, doc_to_choice=choices
    )
    task = LoadedTask(HarnessTask("quiz", (), "acc", None, None, "0" * 64, None), {"part": leaf})
    return {item.id: item.text for item in _harness_items([task])}


def test_words_that_all_questions_begin_and_end_with_are_left_out() -> None:
    questions = ["who was first", "when did it end", "who was last to go"]
    text = "Read this.\nQuestion: {}\nAnswer with one letter:".format
    found = texts_of("generate_until", questions, text, lambda _: ["a b", "c"])
    assert found == {f"quiz/part/{number}": f"{question} a b" for number, question in enumerate(questions)}


def test_a_choice_of_questions_has_the_right_one() -> None:
    """As Winogrande: the choices are what comes before one ending."""
    found = texts_of(
        "multiple_choice", [0, 1], lambda index: index, lambda _: "it was small", lambda _: ["the box", "a cup"]
    )
    assert found == {"quiz/part/0": "the box it was small", "quiz/part/1": "a cup it was small"}


def test_one_item_alone_is_whole_and_no_answer_is_nothing() -> None:
    assert texts_of("generate_until", ["a b"], str, lambda _: []) == {"quiz/part/0": "a b "}
