"""Generated puzzles as they are sought in training text: each found where it stands, none by the wording alone."""

from importlib.metadata import files
from pathlib import Path

import pytest

from headrace.corpus.contamination import Item, Items
from headrace.evaluation import items
from headrace.evaluation.puzzle_texts import puzzle_texts, shared_ends


@pytest.fixture(scope="module")
def sought() -> Items:
    return Items([Item(id_, text) for id_, text in items.texts_of("reasoning_gym")])


def test_all_but_the_shortest_puzzles_can_be_sought(sought: Items) -> None:
    assert sought.by_task() == {"reasoning_gym": {"items": 600, "unchecked": 100}}
    short = {id_ for id_, grams in zip(sought.ids, sought.grams.tolist(), strict=True) if not grams}
    assert {id_.split("/")[1] for id_ in short} == {"spell_backward"}


def test_a_puzzle_is_found_where_it_was_asked_and_no_other_of_its_generator_is(sought: Items) -> None:
    puzzles = items.take("reasoning_gym", 600)
    asked = [f"{puzzle['prompt']} {puzzle['choices'][puzzle['label']]}" for puzzle in puzzles]
    found = {(match.document, match.item) for match in sought.search(asked)}
    assert found == {
        (place, f"reasoning_gym/{puzzle['id']}")
        for place, puzzle in enumerate(puzzles)
        if puzzle["generator"] != "spell_backward"
    }


def test_the_generators_own_source_holds_none_of_them(sought: Items) -> None:
    """It holds their wording, and lies in the environment corpus."""
    paths = [Path(str(path.locate())) for path in files("reasoning-gym") or [] if path.suffix == ".py"]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert sum("sort these words in" in text for text in texts) > 0
    assert sought.search(texts) == []


def puzzle(prompt: str) -> dict[str, object]:
    return {"id": prompt[-3:], "generator": "sums", "prompt": prompt, "choices": ["1", "2"], "label": 1}


def test_as_much_of_the_wording_is_taken_as_makes_an_n_gram() -> None:
    begin = "This is a sum that you may find easy or hard"
    asked = [puzzle(f"{begin} 3 + {own} Answer:") for own in ("4 + 50 + 61 + 7 =", "5 + 12 =")]
    texts = [text for _, text in puzzle_texts(asked)]
    assert texts[0] == "sum that you may find easy or hard 3 + 4 + 50 + 61 + 7 = Answer: 2"  # five numbers, eight words
    assert texts[1] == "is a sum that you may find easy or hard 3 + 5 + 12 = Answer: 2"


def test_what_stands_behind_is_taken_where_the_rest_does_not_do_and_the_answer_where_it_follows() -> None:
    asked = [
        puzzle(f"Add {own} and then write the sum in words of one or more lines Answer:") for own in ("5 7", "6 9")
    ]
    assert [text for _, text in puzzle_texts(asked)] == [
        "Add 5 7 and then write the sum in words of one or",
        "Add 6 9 and then write the sum in words of one or",
    ]


def test_shared_ends_do_not_overlap() -> None:
    assert shared_ends([["a", "b", "a"], ["a", "c", "a"]]) == (1, 1)
    assert shared_ends([["a", "b"], ["a", "b"]]) == (2, 0)
