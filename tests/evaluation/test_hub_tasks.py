"""The harness's own tasks, stood in for by four whose data lie on this disk: the harness itself is the oracle."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from evaluation_world import World
from headrace.config.compose import load as load_config
from headrace.config.schema import EvaluateConfig, HarnessTask
from headrace.errors import UserError
from headrace.evaluation import hub_tasks
from headrace.evaluation.harness import ScorerLM, quiet
from headrace.evaluation.item_texts import item_texts
from headrace.evaluation.scorer import TransformersScorer
from headrace.evaluation.statistics import clustered_mean, proportion
from loopback_hub import LoopbackHub

REACHABLE = hub_tasks.reachable
ITEMS = 18
WORDS = ["fox", "dog", "lazy", "value", "import", "self"]
MEAN = {"aggregation": "mean", "higher_is_better": True}
DEFINITIONS: dict[str, dict[str, Any]] = {
    "reading": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}} {{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["dog"], "max_gen_toks": 6, "do_sample": False},
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "loose", "filter": [{"function": "regex", "regex_pattern": "(the)"}, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{' ' + choices[label]}}",  # such tasks have no delimiter of their own
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "perplexity", "aggregation": "perplexity"}],
    },
    "code": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[label]}}",
        "unsafe_code": True,
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{passage}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_tasks, "reachable", lambda: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(0)
    lines = []
    for number in range(ITEMS + 6):
        choices = generator.choice(WORDS, 3, replace=False).tolist()
        passage = f"the quick brown {WORDS[(number // 3) % 6]}"
        question = f"a {' '.join(generator.choice(WORDS, 4).tolist())}"
        item = {"passage": passage, "question": question, "choices": choices, "label": int(generator.integers(3))}
        lines.append(json.dumps(item) + "\n")
    (root / "shots.jsonl").write_text("".join(lines[ITEMS:]))
    (root / "items.jsonl").write_text("".join(lines[:ITEMS]))
    for name, own in DEFINITIONS.items():
        (root / name).mkdir()
        files = {"test": str(root / "items.jsonl"), "train": str(root / "shots.jsonl")}
        data = {"dataset_path": "json", "test_split": "test", "fewshot_split": "train"}
        kwargs = {"dataset_kwargs": {"data_files": files, "cache_dir": str(root / "cache")}}
        text = yaml.safe_dump({"task": name, "metadata": {"version": 1}, **data, **kwargs, **own})
        (root / name / f"{name}.yaml").write_text(text)
    inline = {"group": "inner", "task": ["last_word"]}
    (root / "groups").mkdir()
    (root / "groups" / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["reading", inline]}))
    return root


@pytest.fixture
def wanted(folder: Path) -> Callable[..., HarnessTask]:
    def build(task: str, metric: str, shots: int | None = 2, passage: str | None = None) -> HarnessTask:
        folders = ("groups", "reading", "last_word") if task == "both" else (task,)
        return HarnessTask(task, folders, metric, shots, passage, hub_tasks.definition(folders, folder), None)

    return build


@pytest.fixture
def model(world: World) -> ScorerLM:
    return ScorerLM(TransformersScorer.load(world.hub), world.encoder(), 128)


def asked(
    folder: Path, model: ScorerLM, *tasks: HarnessTask, count: int = 100
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    loaded, skipped = hub_tasks.load(tasks, "refuse", folder)
    assert skipped == {}
    return hub_tasks.run(loaded, count, model, 300, 0)


@pytest.mark.parametrize(("task", "metrics"), [("reading", ["acc", "acc_norm"]), ("sums", ["exact_match"])])
def test_scores_equal_those_of_the_harness_with_its_own_model(
    folder: Path,
    wanted: Callable[..., HarnessTask],
    model: ScorerLM,
    harness_own_model: Any,
    task: str,
    metrics: list[str],
) -> None:
    """Item by item, few-shot examples and all, through its own front door."""
    with quiet():
        theirs = simple_evaluate(
            model=harness_own_model(128, batch=1),
            tasks=[task],
            num_fewshot=2,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
    filters = ["strict", "loose"] if task == "sums" else ["none"]
    summaries, entries = asked(folder, model, wanted(task, f"{metrics[0]},strict" if task == "sums" else metrics[0]))
    assert len(entries) == ITEMS and summaries[task]["shots"] == 2
    for metric in metrics:
        for name in filters:
            key = f"{metric},{name}" if len(filters) > 1 else metric
            samples = sorted((s for s in theirs["samples"][task] if s["filter"] == name), key=lambda s: s["doc_id"])
            assert [entry["scores"][key] for entry in entries] == [sample[metric] for sample in samples]
            shown = {**summaries[task]["others"], summaries[task]["metric"]: summaries[task]["score"]}[key]
            assert theirs["results"][task][f"{metric},{name}"] == pytest.approx(shown["value"])
    if task == "reading":
        for entry, sample in zip(entries, sorted(theirs["samples"][task], key=lambda s: s["doc_id"]), strict=True):
            gold = sample["filtered_resps"][sample["target"]][0]
            assert entry["nats"] == pytest.approx(-gold, abs=1e-5)


def test_items_of_a_passage_are_one_unit(wanted: Callable[..., HarnessTask], folder: Path, model: ScorerLM) -> None:
    summaries, entries = asked(folder, model, wanted("reading", "acc", passage="passage"))
    assert len({entry["unit"] for entry in entries}) == len(WORDS) == summaries["reading"]["score"]["units"]
    hits, units = [int(entry["scores"]["acc"]) for entry in entries], [entry["unit"] for entry in entries]
    assert summaries["reading"]["score"] == proportion(hits, units).to_json()
    assert summaries["reading"]["chance"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match=r"reading: its items have no field 'story' but passage, question, choices"):
        asked(folder, model, wanted("reading", "acc", passage="story"))


def test_gold_answers_are_scored_by_likelihood_whatever_kind_the_task_is_of(
    wanted: Callable[..., HarnessTask], folder: Path, model: ScorerLM, world: World
) -> None:
    """Against our scorer alone: prompt and answer in one row. Bytes are those of the answer and the space before it."""
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    names = ("reading", "sums", "last_word")
    summaries, entries = asked(folder, model, *(wanted(name, "gold", shots=0) for name in names))
    encoder, scorer = world.encoder(), TransformersScorer.load(world.hub)
    for name in names:
        own, bits = [entry for entry in entries if entry["task"] == name], 0.0
        for item, entry in zip(items, own, strict=True):
            answer = f" {item['choices'][item['label']]}"
            prompt = f"{item['passage']} {item['question']}" if name == "reading" else item["question"]
            context, whole = (encoder.encode([text])[0] for text in (prompt, prompt + answer))
            scores = scorer.log_probabilities(torch.from_numpy(whole[None]))[0, len(context) - 1 :]
            assert entry["nats"] == pytest.approx(-float(scores.sum()), abs=1e-5)
            assert entry["bytes"] == len(answer)
            bits += entry["nats"] / np.log(2)
        assert summaries[name]["score"]["value"] == pytest.approx(bits / sum(entry["bytes"] for entry in own))
        assert summaries[name]["chance"] is None and not summaries[name]["higher_is_better"]
        assert ("scores" in own[0]) == (name != "sums")  # nothing is generated for a gold answer


def test_a_group_is_scored_over_all_its_items_and_counts_hold_for_each_of_its_tasks(
    wanted: Callable[..., HarnessTask], folder: Path, model: ScorerLM
) -> None:
    summaries, entries = asked(folder, model, wanted("both", "acc", shots=None), count=5)
    assert {entry["item"] for entry in entries} == {
        f"{name}/{i}" for name in ("reading", "last_word") for i in range(5)
    }
    assert {entry["task"] for entry in entries} == {"both"} and summaries["both"]["items"] == 10
    hits = np.array([entry["scores"]["acc"] for entry in entries])
    assert summaries["both"]["score"]["value"] == clustered_mean(hits).value
    assert all("perplexity" not in entry["scores"] for entry in entries)  # not a score of one item


def test_hashes_tell_shots_and_items_apart_and_pins_hold_them(
    wanted: Callable[..., HarnessTask], folder: Path, model: ScorerLM
) -> None:
    first, second = (asked(folder, model, wanted("reading", "acc", shots=shots))[1] for shots in (0, 2))
    assert not {entry["hash"] for entry in first} & {entry["hash"] for entry in second}
    summaries, again = asked(folder, model, wanted("reading", "acc", shots=0))
    assert again == first and len({entry["hash"] for entry in first}) == ITEMS
    pinned = replace(wanted("reading", "acc", shots=0), items=summaries["reading"]["items_sha256"])
    asked(folder, model, pinned)
    with pytest.raises(UserError, match=r"reading: its items and prompts \(sha256 [0-9a-f]{64}\) are not those pinned"):
        asked(folder, model, replace(pinned, shots=1))


def test_an_altered_definition_is_refused(folder: Path, wanted: Callable[..., HarnessTask], tmp_path: Path) -> None:
    task, copy = wanted("reading", "acc"), tmp_path / "reading" / "reading.yaml"
    copy.parent.mkdir()
    text = (folder / "reading" / "reading.yaml").read_text()
    copy.write_text(text.replace("{{passage}} ", "{{passage}}: "))
    with pytest.raises(UserError, match=r"reading: lm-eval .* defines it otherwise"):
        hub_tasks.load([task], "skip", tmp_path)
    copy.write_text(text)
    hub_tasks.load([task], "refuse", tmp_path)
    (copy.parent / "helper.py").write_text("")  # what a definition may import counts too
    with pytest.raises(UserError, match="defines it otherwise"):
        hub_tasks.load([task], "skip", tmp_path)


def test_texts_of_all_items_are_question_and_right_answer(wanted: Callable[..., HarnessTask], folder: Path) -> None:
    """Without shots, whatever their number is and however few items are evaluated; HumanEval's and puzzles' beside."""
    named = tuple(wanted(task, "gold") for task in ("both", "sums", "code"))
    config = replace(load_config(["evaluate=tiny"]).evaluate, harness=named)
    items, absent = item_texts(config, folder)
    assert set(absent) == {"code"}
    texts = {item.id: item.text for item in items}
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        question, answer = line["question"].removeprefix("a "), line["choices"][line["label"]]
        passage = line["passage"].removeprefix("the quick brown ")  # which all of them begin with
        assert texts[f"both/reading/{number}"] == f"{passage} a {question} {answer}"
        assert texts[f"both/last_word/{number}"] == texts[f"sums/sums/{number}"] == f"{question} {answer}"
    assert len(texts) == 3 * ITEMS + 164 + 600 and "humaneval_likelihood/HumanEval/163" in texts


def test_code_that_a_model_writes_is_never_run(wanted: Callable[..., HarnessTask], folder: Path) -> None:
    loaded, skipped = hub_tasks.load([wanted("code", "exact_match")], "refuse", folder)
    assert loaded == [] and list(skipped) == ["code"] and "runs code" in skipped["code"]


def test_items_of_a_task_that_runs_code_are_read_from_its_data(
    wanted: Callable[..., HarnessTask], folder: Path, tmp_path: Path
) -> None:
    def asked_of(data: str) -> EvaluateConfig:
        text = (folder / "code" / "code.yaml").read_text()
        text = text.replace("items.jsonl", data).replace("shots.jsonl", data).replace(str(folder), str(tmp_path))
        (tmp_path / "code" / "code.yaml").write_text(f"{text}process_results: !function breaks.pass_at_1\n")
        task = replace(wanted("code", "exact_match"), definition=hub_tasks.definition(("code",), tmp_path))
        return replace(load_config(["experiment=tiny"]).evaluate, tasks=(), harness=(task,))

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "breaks.py").write_text("raise SystemExit('it was run')")
    rows = [{"task_id": number, "text": f"question {number}", "code": f"code {number}"} for number in range(5)]
    (tmp_path / "programs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, absent = item_texts(asked_of("programs.jsonl"), tmp_path)
    assert absent == {}
    expected = [(f"code/code/{row['task_id']}", f"{row['text']} {row['code']}") for row in rows]
    assert [(item.id, item.text) for item in items] == expected
    gone = asked_of("gone.jsonl")
    with pytest.raises(UserError, match=r"^evaluate\.harness: code: its data cannot be had: .*gone\.jsonl"):
        item_texts(gone, tmp_path)
    _, absent = item_texts(replace(gone, without_network="skip"), tmp_path)
    assert absent["code"].startswith("its data cannot be had: ")


def test_a_task_whose_code_asks_for_what_is_not_here_is_skipped_with_the_reason() -> None:
    (minerva,) = (task for task in load_config(["evaluate=v3_base"]).evaluate.harness if task.task == "minerva_math")
    loaded, skipped = hub_tasks.load([minerva], "refuse")
    assert loaded == []
    assert skipped["minerva_math"].startswith("its definition does not run here: ")
    assert "antlr4" in skipped["minerva_math"]


def test_without_a_network_tasks_are_refused_in_one_line_or_skipped_with_the_reason(
    wanted: Callable[..., HarnessTask], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_tasks, "reachable", lambda: False)
    tasks = [wanted("reading", "acc"), wanted("sums", "gold")]
    with pytest.raises(
        UserError, match=r"^evaluate\.harness: reading: .* cannot be reached; leave it out or"
    ) as caught:
        hub_tasks.load(tasks, "refuse", folder)
    assert "\n" not in str(caught.value)
    loaded, skipped = hub_tasks.load(tasks, "skip", folder)
    assert loaded == [] and set(skipped) == {"reading", "sums"} and "cannot be reached" in skipped["sums"]


def test_data_that_are_gone_are_no_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    text = (folder / "reading" / "reading.yaml").read_text().replace("items.jsonl", "nowhere.jsonl")
    (tmp_path / "gone" / "gone.yaml").write_text(text.replace("task: reading", "task: gone"))
    pinned = hub_tasks.definition(["gone"], tmp_path)
    task = HarnessTask("gone", ("gone",), "acc", 0, None, pinned, None)
    with pytest.raises(UserError, match=r"gone: its data cannot be had: .*nowhere\.jsonl"):
        hub_tasks.load([task], "refuse", tmp_path)
    assert set(hub_tasks.load([task], "skip", tmp_path)[1]) == {"gone"}


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        ("reading", "f1", "reading has no metric 'f1'; it has acc, acc_norm"),
        ("sums", "exact_match", "sums has no metric 'exact_match'; it has exact_match,loose, exact_match,strict"),
        ("whole", "word_perplexity", "whole: whole documents are measured by bits per byte"),
    ],
)
def test_what_is_not_offered_is_refused(
    wanted: Callable[..., HarnessTask], folder: Path, model: ScorerLM, task: str, metric: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        asked(folder, model, wanted(task, metric))


def test_unknown_and_repeated_tasks_are_refused(wanted: Callable[..., HarnessTask], folder: Path) -> None:
    task = wanted("reading", "acc")
    with pytest.raises(UserError, match="has no task 'reding' in the folders"):
        hub_tasks.load([replace(task, task="reding")], "skip", folder)
    with pytest.raises(UserError, match=r"reading: lm-eval .* has no folder nowhere"):
        hub_tasks.load([replace(task, folders=("nowhere",))], "skip", folder)
    with pytest.raises(UserError, match="reading stands there twice"):
        hub_tasks.load([task, task], "skip", folder)


def test_whether_the_hub_answers_is_asked_once_and_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        assert REACHABLE()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    assert not REACHABLE()


STANDINS: dict[str, tuple[dict[str, str], str, str]] = {  # of a line of its data: prompt and answer
    "squad_completion": ({"text": "the lazy dog is called ", "value": "fox"}, "the lazy dog is called", " fox"),
    "arithmetic": (
        {"context": "Q: What is 3 plus 4?\n\nA:", "completion": " 7"},
        "Question: What is 3 plus 4?\nAnswer:",
        " 7",
    ),
}


@pytest.mark.parametrize("name", STANDINS)
def test_tasks_of_other_kinds_in_the_sets_give_gold_answers(
    name: str, model: ScorerLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the installed harness defines them, one as a class, one as ten tasks; their data are stood in for."""
    line, prompt, answer = STANDINS[name]
    data = datasets.DatasetDict({"validation": datasets.Dataset.from_list([line])})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    (task,) = (task for task in load_config(["evaluate=early_signal"]).evaluate.harness if task.task == name)
    loaded, skipped = hub_tasks.load([task], "refuse")
    summaries, entries = hub_tasks.run(loaded, 5, model, 300, 0)
    assert skipped == {} and summaries[name]["metric"] == "bits per byte of the right answer"
    assert len(entries) == summaries[name]["items"] == (10 if name == "arithmetic" else 1)
    (found,) = model.loglikelihood([Instance("loglikelihood", line, (prompt, answer), 0)])
    for entry in entries:
        assert entry["nats"] == pytest.approx(-found.log_likelihood, abs=1e-5) and entry["bytes"] == len(answer)


SIX = ("LiveCodeBench-Base", "CMath", "CLUEWSC", "CMRC", "C3", "CCPM")
CODE = {"humaneval", "mbpp", "cruxeval_input", "cruxeval_output"}


@pytest.mark.parametrize("choice", ["early_signal", "v3_base"])
def test_the_sets_are_the_harnesss_tasks_as_pinned_and_without_a_network_say_so(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the installed harness: folders, definitions, members of groups, what runs code, names of metrics."""
    config = load_config([f"evaluate={choice}"]).evaluate
    monkeypatch.setattr(hub_tasks, "reachable", lambda: False)
    with pytest.raises(UserError, match="cannot be reached"):
        hub_tasks.load(config.harness, config.without_network)
    loaded, skipped = hub_tasks.load(config.harness, "skip")
    assert loaded == [] and list(skipped) == [task.task for task in config.harness]
    assert {name for name, reason in skipped.items() if "runs code" in reason} == CODE & set(skipped)
    if choice == "v3_base":
        assert set(skipped) > CODE
        assert all(any(entry.startswith(name) for entry in config.absent) for name in SIX)


def test_v3s_table_has_v3s_shots() -> None:
    """The published numbers of shots (report, table 3), and the harness's names."""
    shots = {task.task: task.shots for task in load_config(["evaluate=v3_base"]).evaluate.harness}
    assert shots == {
        "bbh_cot_fewshot": 3, "mmlu": 5, "mmlu_redux_generative": 5, "mmlu_pro": 5, "drop": 3, "arc_easy": 25,
        "arc_challenge": 25, "hellaswag": 10, "piqa": 0, "winogrande": 5, "race": 5, "triviaqa": 5, "nq_open": 5,
        "agieval": 0, "humaneval": 0, "mbpp": 3, "cruxeval_input": 2, "cruxeval_output": 2, "gsm8k_cot": 8,
        "minerva_math": 4, "mgsm_cot_native": 8, "ceval-valid": 5, "cmmlu": 5, "mmmlu": 5,
    }  # fmt: skip
