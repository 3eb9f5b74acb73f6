"""Cards that no reader takes are refused before anything is asked of the Hub, in a dry run as in a push."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData

from headrace.errors import UserError
from headrace.publication import card
from headrace.publication.card_checks import card_problem, eval_results_problem
from headrace.publication.facts import Measurement
from headrace.publication.hub import push
from headrace.publication.repository import build_repository, describe
from publication.publication_fixtures import FINGERPRINT, card_facts, model_folder

BROKEN = Measurement("Bits per byte", "held-out", None, "bits_per_byte", float("nan"), None, None, 321, {})


def with_metadata(text: str, **changes: object) -> str:
    """A card with some fields given anew, as JSON, which is YAML too."""
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in changes.items())
    return f"---\n{lines}---\n{text}"


SCORE = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "a/b", "name": "b"},
    "metrics": [{"type": "accuracy", "value": 0.5}],
}


@pytest.mark.parametrize(
    "metadata",
    [
        {"license": "apache-2.0", "language": ["en", "code"], "tags": ["a b", "c"], "base_model": "me/model"},
        {"license": ["mit", "cc-by-4.0"], "language": "zh-Hant", "datasets": ["me/a", "me/b"]},
        {"license": "other", "license_name": "see-sources", "size_categories": ["n<1K"], "pretty_name": "A: tokens"},
        {"size_categories": ["10K<n<100K"], "configs": [{"config_name": "default", "data_files": []}]},
        {"model-index": [{"name": "a", "results": [SCORE]}]},
    ],
)
def test_cards_that_are_right_pass(metadata):
    assert card_problem(with_metadata("# A\n", **metadata)) is None


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"license": "Apache 2.0"}, "license"),
        ({"license": 2}, "license"),
        ({"license": None}, "license"),
        ({"license": "other"}, "license_name"),
        ({"license": "other", "license_name": "See the sources"}, "license_name"),
        ({"language": ["english"]}, "language"),
        ({"language": [True]}, "language"),
        ({"tags": [1]}, "tags"),
        ({"tags": [["a"]]}, "tags"),
        ({"tags": {"a": "b"}}, "tags"),
        ({"pipeline_tag": ["text-generation"]}, "pipeline_tag"),
        ({"base_model": "a/b/c"}, "base_model"),
        ({"base_model": None}, "base_model"),
        ({"datasets": ["ok/ok", "not ok"]}, "datasets"),
        ({"size_categories": ["n<1001"]}, "size_categories"),
        ({"size_categories": ["n>100M"]}, "size_categories"),
        ({"configs": ["default"]}, "configs"),
        ({"configs": [{"data_files": []}]}, "configs"),
        ({"model-index": []}, "model-index"),
        ({"model-index": "a"}, "model-index"),
        ({"model-index": [{"name": "a"}]}, "model-index"),
        ({"model-index": [{"name": "a", "results": []}]}, "model-index"),
        ({"model-index": [{"name": "a", "results": [SCORE | {"metrics": [{"type": "b"}]}]}]}, "model-index"),
        ({"model-index": [{"name": "a", "results": [SCORE | {"dataset": {"name": "b"}}]}]}, "model-index"),
        ({"model-index": [{"name": "a", "results": [SCORE | {"task": {"type": 1}}]}]}, "model-index"),
        ({"model-index": [{"name": 1, "results": [SCORE]}]}, "model-index"),
    ],
)
def test_fields_that_no_reader_takes_are_named(metadata, says):
    wrong = card_problem(with_metadata("# A\n", **metadata))
    assert wrong is not None and says in wrong and "\n" not in wrong


@pytest.mark.parametrize("value", [".nan", ".inf", "'0.5'", "true", "[1]"])
def test_a_score_that_is_no_finite_number_is_named(value):
    result = f"{{task: {{type: t}}, dataset: {{type: d, name: d}}, metrics: [{{type: m, value: {value}}}]}}"
    text = f"model-index: [{{name: a, results: [{result}]}}]\n"
    assert "no finite number" in (card_problem(f"---\n{text}---\n") or "")
    assert card_problem(f"---\n{text.replace(value, '0.5')}---\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: b\n",
        "- &a [*a]\n",
        "- value: 1\n",
        "- dataset: {id: a/b}\n  value: 1\n",
        "- dataset: {id: a/b/c, task_id: d}\n  value: 1\n",
        "- dataset: {id: a/b, task_id: d}\n  value: .nan\n",
        "- dataset: {id: a/b, task_id: 1}\n  value: 1\n",
    ],
)
def test_files_of_scores_that_hold_none_are_named(text):
    wrong = eval_results_problem(text)
    assert wrong is not None and "\n" not in wrong


def test_a_run_whose_scores_are_no_numbers_is_refused_and_leaves_nothing(tmp_path):
    model = model_folder(tmp_path / "model")
    with pytest.raises(UserError, match=r"^[^\n]*README\.md: publish: its model-index has a bits_per_byte [^\n]*$"):
        build_repository(tmp_path / "tree", model, card_facts(measurements=[BROKEN]))
    assert not (tmp_path / "tree").exists()


def spoilt(folder: Path, metadata: ModelCardData) -> Path:
    """A tree whose card was written by hand, and whose manifest agrees."""
    build_repository(folder, model_folder(folder.with_name("model")), card_facts())
    (folder / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n# A model\n")
    (folder / "headrace.json").unlink()
    told = {"schema": 1, "fingerprint": FINGERPRINT, "files": describe(folder)}
    (folder / "headrace.json").write_text(json.dumps(told))
    return folder


def test_a_push_with_a_card_that_is_wrong_asks_nothing_of_the_hub(hub, tmp_path):
    tree = spoilt(tmp_path / "tree", ModelCardData(license="Some licence of mine"))
    with pytest.raises(UserError, match=r"^[^\n]*README\.md: publish: its metadata has license: 'Some licence[^\n]*$"):
        push(tree, "me/small", private=True, message="Publish", endpoint=hub.url)
    assert hub.requests == [] and hub.repositories == {}


def test_what_only_the_hub_knows_of_a_card_is_one_line(hub, tmp_path):
    tree = spoilt(tmp_path / "tree", ModelCardData(language="en"))  # the stand-in wants a licence
    with pytest.raises(
        UserError, match=r"^publish\.repo_id=me/small: the Hub does not take the card [^\n]*license[^\n]*$"
    ):
        push(tree, "me/small", private=True, message="Publish", endpoint=hub.url)
    assert hub.repositories["me/small"].messages == ["initial"]


def test_the_cards_of_headrace_are_right():
    assert card_problem(card.render(card_facts())) is None
    assert all(eval_results_problem(text) is None for text in card.eval_result_files(card_facts()).values())
