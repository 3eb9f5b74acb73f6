import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from evaluation_world import LENGTH, World
from headrace.evaluation import harness, items
from headrace.evaluation.heldout import read
from headrace.evaluation.scorer import TransformersScorer, score_rows

LONG = 256


def request(kind: str, *arguments: str) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("length", [LONG, LENGTH])
def test_log_likelihoods_equal_the_harnesss_own_model(world: World, harness_own_model: Any, length: int) -> None:
    ours = harness.ScorerLM(TransformersScorer.load(world.hub), world.encoder(), length)
    pairs = [
        ("the quick brown fox", " jumps over the lazy dog"),
        ("def value(", "the"),
        ("", "return self value"),
        ("naïve 数 " * 12, " lazy dog 22"),
        ("trailing space ", "moves over"),
        *[(item["prompt"][-60:], " " + item["choices"][0]) for item in items.take("reasoning_gym", 6)],
    ]
    requests = [request("loglikelihood", *pair) for pair in pairs if len(pair[1]) < LENGTH]
    assert len(requests) >= 8
    theirs = harness_own_model(length).loglikelihood(requests, disable_tqdm=True)
    for own, other in zip(ours.loglikelihood(requests), theirs, strict=True):
        assert own.log_likelihood == pytest.approx(other[0], abs=1e-5) and own.greedy == other[1]


def test_bits_per_byte_equal_the_harnesss_rolling_log_likelihood(world: World, harness_own_model: Any) -> None:
    """Whole documents in one row: for longer ones the harness gives the last window more context than our rows get."""
    rows = read(world.heldout, world.encoder(), 1024, 10_000)
    assert len(rows.tokens) == len(rows.documents) == len(world.texts)
    scorer = TransformersScorer.load(world.hub)
    own = rows.per_document(score_rows(scorer, rows.tokens, rows.lengths, world.config.vocab_size).sum(axis=1))
    chosen = list(range(0, 40, 4))  # without the document that spells a control token, which the harness takes for one
    model = harness_own_model(1024)
    texts = [request("loglikelihood_rolling", world.texts[rows.documents[place].id]) for place in chosen]
    theirs = model.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(own[chosen] / rows.lengths[chosen], theirs / rows.lengths[chosen], atol=1e-5)


def test_continuations_longer_than_the_model_are_scored_to_the_last_token(world: World) -> None:
    encoder, scorer = world.encoder(), TransformersScorer.load(world.hub)
    text = world.texts[8]
    tokens = encoder.encode([text])[0]
    assert len(tokens) > 2 * 16
    answer = harness.ScorerLM(scorer, encoder, 16).loglikelihood([request("loglikelihood", "", text)])[0]
    total = 0.0
    for start in range(0, len(tokens), 16):  # disjoint pieces with one token of context
        row = np.concatenate([[encoder.eos], tokens])[start : start + 17]
        if start + 16 > len(tokens):  # the last piece keeps a full context
            row, skip = np.concatenate([[encoder.eos], tokens])[-17:], 17 - len(row)
        else:
            skip = 0
        total += float(scorer.log_probabilities(torch.from_numpy(row[None]))[0, skip:].sum())
    assert answer.log_likelihood == pytest.approx(total, abs=1e-4)


def test_tasks_run_without_a_network_and_repeat(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a task tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    scorer, encoder = TransformersScorer.load(world.hub), world.encoder()
    names = ["humaneval_likelihood", "reasoning_gym"]
    outcomes = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        outcomes.append(harness.run(names, 12, scorer, encoder, 64, tmp_path / run, 200, 0))
    assert outcomes[0] == outcomes[1]
    summaries, entries = outcomes[0]
    likelihood, choice = summaries["humaneval_likelihood"], summaries["reasoning_gym"]
    assert likelihood["items"] == choice["items"] == 12 and len(entries) == 24
    own = [entry for entry in entries if entry["task"] == "humaneval_likelihood"]
    bits = sum(entry["nats"] for entry in own) / np.log(2) / sum(entry["bytes"] for entry in own)
    assert likelihood["score"]["value"] == pytest.approx(bits)
    assert likelihood["score"]["low"] < bits < likelihood["score"]["high"]
    assert "not pass@1" in likelihood["measures"] and likelihood["chance"] is None
    assert choice["chance"] == 0.25 and sum(part["units"] for part in choice["by_generator"].values()) == 12
    right = [entry["scores"]["accuracy"] for entry in entries if entry["task"] == "reasoning_gym"]
    assert choice["score"]["value"] == sum(right) / 12
    assert (tmp_path / "a" / "reasoning_gym.yaml").exists()


def test_scored_bytes_are_those_of_the_solution_and_the_white_space_before_it(world: World) -> None:
    model = harness.ScorerLM(TransformersScorer.load(world.hub), world.encoder(), LONG)
    item = items.humaneval()[0]
    blank = len(item["prompt"]) - len(item["prompt"].rstrip())
    assert model.scored_bytes(item["prompt"], item["solution"]) == len(item["solution"].encode()) + blank


def test_choices_are_judged_by_the_likelihood_of_the_whole_answer(world: World, tmp_path: Path) -> None:
    """Against our own scorer, with lm-eval out of the way."""
    scorer, encoder = TransformersScorer.load(world.hub), world.encoder()
    _, entries = harness.run(["reasoning_gym"], 12, scorer, encoder, LONG, tmp_path, 100, 0)
    for item, entry in zip(items.take("reasoning_gym", 12), entries, strict=True):
        scores = []
        for choice in item["choices"]:
            context, whole = (encoder.encode([text])[0] for text in (item["prompt"], f"{item['prompt']} {choice}"))
            row = torch.from_numpy(whole[-(LONG + 1) :][None])
            scores.append(float(scorer.log_probabilities(row)[0, -(len(whole) - len(context)) :].sum()))
        assert entry["scores"] == {"accuracy": int(int(np.argmax(scores)) == item["label"])}
        assert entry["nats"] == pytest.approx(-scores[item["label"]], abs=1e-4)
        assert entry["bytes"] == len(f" {item['choices'][item['label']]}")


@pytest.mark.parametrize(
    "settings",
    [
        {"until": [], "max_gen_toks": 12, "do_sample": False},
        {"until": ["the", "x y"], "max_gen_toks": 20, "do_sample": False},
        {"until": [" "], "max_gen_toks": 5, "do_sample": False},
    ],
    ids=["to the end", "to a stop sequence", "to a space"],
)
def test_generated_text_equals_the_harnesss_own_models(
    world: World, harness_own_model: Any, settings: dict[str, Any]
) -> None:
    ours = harness.ScorerLM(TransformersScorer.load(world.hub), world.encoder(), LENGTH)
    contexts = ["the quick brown", "def value(", " ".join(["lazy dog"] * 30), "naïve 数"]
    requests = [request("generate_until", context, settings) for context in contexts]
    theirs = harness_own_model(LENGTH, batch=1).generate_until(requests, disable_tqdm=True)
    found = ours.generate_until(requests)
    assert found == theirs and len(set(found)) > 1
    assert not any(stop in answer for answer in found for stop in settings["until"])


def test_an_answer_that_would_fill_the_model_leaves_half_to_its_context(world: World) -> None:
    scorer, encoder = TransformersScorer.load(world.hub), world.encoder()
    context = " ".join(["lazy dog"] * 30)
    long, half = (
        harness.ScorerLM(scorer, encoder, 16).generate_until(
            [request("generate_until", context, {"max_gen_toks": wanted})]
        )
        for wanted in (500, 8)
    )
    assert long == half and long[0]
