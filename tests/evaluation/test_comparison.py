"""Paired comparison of finished evaluations: against scipy, by hand, and left out where items differ."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from headrace.errors import UserError
from headrace.evaluation.comparison import EvaluatedRun, compare, markdown

TASK = {"tasks": {"quiz": {"definition": "d"}, "code": {"definition": "d"}}}
Entries = list[dict[str, Any]]


def quiz(scores: np.ndarray, passage: int = 1) -> Entries:
    return [
        {
            "task": "quiz",
            "item": f"q{i:04}",
            "hash": f"h{i}",
            "unit": f"u{i // passage}",
            "scores": {"acc": float(score)},
        }
        for i, score in enumerate(scores)
    ]


def documents(bits: np.ndarray, size: np.ndarray, kinds: list[str]) -> Entries:
    return [
        {"task": "bits_per_byte", "item": f"d{i}", "hash": f"h{i}", "unit": str(i), "kind": kind, "bytes": int(own),
         "bits": {"model": float(bit), "bigram": 0.0}}
        for i, (bit, own, kind) in enumerate(zip(bits, size, kinds, strict=True))
    ]  # fmt: skip


def run(name: str, entries: Entries, differs: tuple[str, ...] = ()) -> EvaluatedRun:
    return EvaluatedRun(name, TASK, entries, differs)


def rows_of(facts: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["metric"]): row for row in facts["rows"]}


def test_scores_are_compared_as_a_paired_t_test_does() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(0, 1, 60), generator.normal(0.5, 1, 60)
    facts = compare([run("a", quiz(first)), run("b", quiz(second)[::-1])], 200)  # the order of lines is nothing
    row = rows_of(facts)["quiz", "acc"]
    expected = stats.ttest_rel(second, first)
    own = row["differences"]["b"]
    assert own["value"] == pytest.approx((second - first).mean()) and own["p"] == pytest.approx(expected.pvalue)
    assert own["low"] == pytest.approx(expected.confidence_interval(0.95).low)
    assert own["p_holm"] == own["p"] and own["found"] == "better" and row["higher_is_better"]
    assert own["detectable"] == pytest.approx(2.8016 * stats.sem(second - first), rel=1e-4)
    assert (row["items"], row["units"]) == (60, 60)


def test_items_of_one_passage_count_as_one() -> None:
    """Every question asked six times over: six times the items, not a bit more certain."""
    difference = np.random.default_rng(1).normal(0.1, 1, 40)
    alone = rows_of(compare([run("a", quiz(np.zeros(40))), run("b", quiz(difference))], 200))["quiz", "acc"]
    zeros, repeated = quiz(np.zeros(240), 6), quiz(np.repeat(difference, 6), 6)
    clustered = rows_of(compare([run("a", zeros), run("b", repeated)], 200))["quiz", "acc"]
    assert (clustered["items"], clustered["units"]) == (240, 40)
    for key in ("value", "low", "high", "p"):
        assert clustered["differences"]["b"][key] == pytest.approx(alone["differences"]["b"][key])


def test_bits_per_byte_are_compared_by_document_overall_and_by_kind() -> None:
    generator = np.random.default_rng(2)
    size = generator.lognormal(7, 0.7, 60).round()
    first = size * generator.normal(2, 0.5, 60)
    second = first - size * generator.normal(0.05, 0.02, 60)
    kinds = ["code" if i % 2 else "docs" for i in range(60)]
    pair = [run(name, documents(bits, size, kinds)) for name, bits in (("a", first), ("b", second))]
    facts = compare(pair, 400)
    rows = rows_of(facts)
    assert set(rows) == {(f"bits_per_byte{kind}", "bits per byte") for kind in ("", ", code", ", docs")}
    overall = rows["bits_per_byte", "bits per byte"]
    own = overall["differences"]["b"]
    assert own["value"] == pytest.approx((second - first).sum() / size.sum())
    assert own["high"] < 0 and own["found"] == "better" and not overall["higher_is_better"]
    assert overall["values"]["a"]["value"] == pytest.approx(first.sum() / size.sum())
    width = overall["values"]["a"]["high"] - overall["values"]["a"]["low"]
    assert own["high"] - own["low"] < 0.2 * width  # far more certain than the two figures
    swapped = rows_of(compare(pair[::-1], 400))["bits_per_byte", "bits per byte"]["differences"]["a"]
    assert swapped["found"] == "worse" and swapped["value"] == -own["value"]


def test_text_of_one_kind_gives_one_row() -> None:
    one = documents(np.arange(1.0, 9.0), np.full(8, 4.0), ["docs"] * 8)
    assert len(compare([run("a", one), run("b", one)], 100)["rows"]) == 1


def test_holm_counts_every_difference_of_the_table() -> None:
    generator = np.random.default_rng(3)
    base = generator.normal(0, 1, 50)
    likelihoods = [
        [
            {"task": "code", "item": f"p{i}", "hash": "h", "unit": f"p{i}", "nats": nats, "bytes": 10}
            for i, nats in enumerate(generator.normal(20, 3, 50))
        ]
        for _ in range(3)
    ]
    runs = [
        run(name, quiz(base + generator.normal(shift, 1, 50)) + own)
        for name, shift, own in zip("abc", (0.0, 0.45, 0.0), likelihoods, strict=True)
    ]
    facts = compare(runs, 500)
    assert facts["adjusted"] == "Holm over 4 differences" and facts["first"] == "a"
    found = [entry for row in facts["rows"] for entry in row["differences"].values()]
    plain = sorted(entry["p"] for entry in found)
    assert min(entry["p_holm"] for entry in found) == pytest.approx(min(1, 4 * plain[0]))
    bits = rows_of(facts)["code", "bits per byte"]
    expected = sum(entry["nats"] for entry in likelihoods[0]) / math.log(2) / 500
    assert bits["values"]["a"]["value"] == pytest.approx(expected)


def test_equal_runs_are_not_said_to_be_equal_to_within_nothing() -> None:
    facts = compare([run("a", quiz(np.eye(1, 40)[0])), run("b", quiz(np.eye(1, 40)[0]))], 100)
    own = facts["rows"][0]["differences"]["b"]
    assert (own["value"], own["low"], own["p_holm"], own["found"]) == (0.0, None, None, None)
    assert facts["adjusted"] == "Holm over 0 differences"


def changed(entries: Entries, **values: Any) -> Entries:
    return [*entries[:3], {**entries[3], **values}, *entries[4:]]


@pytest.mark.parametrize("other", ["another", "fewer", "renamed"])
def test_a_task_with_other_items_is_left_out_and_the_first_of_them_named(other: str) -> None:
    entries = quiz(np.zeros(10))
    altered = {
        "another": changed(entries, hash="x"),
        "fewer": [*entries[:3], *entries[4:]],
        "renamed": changed(entries, item="q0003b"),
    }[other]
    text = documents(np.arange(1.0, 9.0), np.full(8, 4.0), ["docs"] * 8)
    facts = compare([run("a", entries + text), run("b", altered + text), run("c", entries + text)], 100)
    assert list(rows_of(facts)) == [("bits_per_byte", "bits per byte")]
    assert facts["adjusted"] == "Holm over 0 differences"  # equal runs; nothing of what was left out is counted
    (reason,) = facts["left_out"]
    count = len(altered)
    assert reason == f"quiz: acc: other items in b ({count}) than in a (10), the first that differs is 'q0003'"
    assert f"- {reason}" in markdown(facts).splitlines()


def test_text_cut_elsewhere_is_left_out_and_the_tasks_are_compared() -> None:
    """As with another tokenizer: no document has the same hash, all items of the tasks do."""
    generator = np.random.default_rng(5)
    scores = [quiz(generator.normal(shift, 1, 60)) for shift in (0.0, 1.0)]
    kinds = ["docs", "code"] * 4
    text = documents(np.arange(1.0, 9.0), np.full(8, 4.0), kinds)
    cut = [{**entry, "hash": f"x{i}"} for i, entry in enumerate(text)]
    facts = compare([run("a", scores[0] + text), run("b", scores[1] + cut)], 200)
    alone = compare([run("a", scores[0]), run("b", scores[1])], 200)
    assert facts["rows"] == alone["rows"] and facts["rows"][0]["differences"]["b"]["found"] == "better"
    assert [name.split(": other items")[0] for name in facts["left_out"]] == [
        "bits_per_byte: bits per byte",
        "bits_per_byte, code: bits per byte",
        "bits_per_byte, docs: bits per byte",
    ]


def test_a_kind_of_text_that_is_the_same_is_compared_though_another_is_not() -> None:
    text = documents(np.arange(1.0, 9.0), np.full(8, 4.0), ["docs", "code"] * 4)
    facts = compare([run("a", text), run("b", changed(text, hash="x"))], 100)  # the fourth is code
    assert list(rows_of(facts)) == [("bits_per_byte, docs", "bits per byte")] and len(facts["left_out"]) == 2


def test_a_task_asked_in_another_way_is_left_out() -> None:
    text = documents(np.arange(1.0, 9.0), np.full(8, 4.0), ["docs"] * 8)
    other = replace(run("b", quiz(np.zeros(10)) + text), results={"tasks": {"quiz": {"definition": "e"}}})
    facts = compare([run("a", quiz(np.zeros(10)) + text), other], 100)
    assert facts["left_out"] == ["quiz: acc: asked in another way (shots, prompt) in b than in a"]
    assert len(facts["rows"]) == 1


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (
            changed(quiz(np.zeros(10)), hash="x"),
            "quiz: other items in b (10) than in a (10), the first that differs is",
        ),
        (documents(np.ones(8), np.ones(8), ["docs"] * 8), "quiz: not in b (figures left out besides it: 1)"),
    ],
)
def test_runs_that_share_nothing_are_refused_in_one_line(second: Entries, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        compare([run("a", quiz(np.zeros(10))), run("b", second)], 100)
    told = str(refused.value)
    assert told.startswith(f"evaluate a, b: nothing to compare: {reason}") and "\n" not in told
    assert "same corpus, tokenizer and evaluate" in told


def test_runs_without_any_figure_are_refused() -> None:
    with pytest.raises(UserError, match="nothing to compare: none has a task"):
        compare([run("a", []), run("b", [])], 100)


def test_results_from_before_items_had_hashes_are_refused() -> None:
    old = [{key: value for key, value in entry.items() if key != "hash"} for entry in quiz(np.zeros(10))]
    with pytest.raises(UserError, match="evaluate b: written before items carried hashes; run evaluate again"):
        compare([run("a", quiz(np.zeros(10))), run("b", old)], 100)


def test_what_only_some_runs_have_is_named_and_not_compared() -> None:
    text = documents(np.arange(1.0, 9.0), np.full(8, 4.0), ["docs"] * 8)
    facts = compare([run("a", quiz(np.zeros(10)) + text), run("b", text)], 100)
    assert facts["left_out"] == ["quiz: acc: not in b"] and len(facts["rows"]) == 1
    assert "- quiz: acc: not in b" in markdown(facts)


def test_the_table_shows_every_run_and_every_difference() -> None:
    generator = np.random.default_rng(4)
    base = (generator.random(200) < 0.3).astype(float)
    better = np.maximum(base, generator.random(200) < 0.4)
    runs = [run("a", quiz(base)), run("b", quiz(better), ("recipe.tokens=2",)), run("c", quiz(base))]
    text = markdown(compare(runs, 100))
    lines = text.splitlines()
    assert "- `b`: `recipe.tokens=2`" in lines and "## b - a" in lines and "## c - a" in lines
    values = next(line for line in lines if line.startswith("| quiz | acc | 200 | 200 |"))
    assert f"{base.mean():.4f} [" in values and f"{better.mean():.4f} [" in values
    cells = [cell.strip() for cell in lines[lines.index("## b - a") + 4].split("|")[1:-1]]
    assert cells[:3] == ["quiz", "acc", f"{(better - base).mean():+.4f}"]
    assert cells[4] == "< 0.001" and cells[6] == "better"
    assert lines[lines.index("## c - a") + 4] == "| quiz | acc | +0.0000 | – | – | – | – |"
    for table in text.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1
