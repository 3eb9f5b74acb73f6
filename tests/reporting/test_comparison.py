"""Comparisons on the page: those of this run and no others, with the figures that compare.json holds."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.artifacts.files import write_json
from headrace.evaluation.comparison import EvaluatedRun, compare
from headrace.reporting.comparison import read_comparisons, section
from headrace.reporting.facts import Comparison, Estimate, ReportFacts
from headrace.reporting.page import render, with_comparisons, write_comparison

OURS, OTHER, THIRD = "0123456789ab", "3fa1c0ffee00", "77c0decade00"


def words(page: str) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\N{NO-BREAK SPACE}", " ")
    return " ".join(text.replace("\N{MINUS SIGN}", "-").split())


def compared(page: str) -> str:
    return words(page[page.index('<section id="compared"') : page.index('<section id="agreement"')])


def evaluated(name: str, scores: list[int], tasks: tuple[str, ...] = ("quiz",), *differs: str) -> EvaluatedRun:
    entries = [
        {"task": task, "item": f"q{i}", "hash": f"h{i}", "unit": str(i), "scores": {"acc": float(score)}}
        for task in tasks
        for i, score in enumerate(scores)
    ]
    return EvaluatedRun(name, {"tasks": {task: {"definition": "d"} for task in tasks}}, entries, differs)


def write_compared(results: Path, folder: str, *runs: EvaluatedRun) -> None:
    target = results / "compare" / folder
    target.mkdir(parents=True)
    write_json(target / "compare.json", compare(runs, 200))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    ours, better = [1, 0] * 50, [1, 1, 1, 0] * 25  # 50 and 75 right of the same 100
    write_compared(
        tmp_path,
        "aaaaaaaaaaaa",
        evaluated(OURS, ours, ("quiz", "extra")),
        evaluated(OTHER, better, ("quiz",), "recipe.learning_rate.peak=0.002"),
    )
    write_compared(tmp_path, "bbbbbbbbbbbb", evaluated(OTHER, ours), evaluated(THIRD, ours))
    return tmp_path


def test_only_comparisons_that_this_run_takes_part_in_are_read(results: Path) -> None:
    (found,) = read_comparisons(results, OURS)
    assert list(found.runs) == [OURS, OTHER] and found.source == "compare/aaaaaaaaaaaa/compare.json"
    assert len(read_comparisons(results, OTHER)) == 2
    assert read_comparisons(results, "ffffffffffff") == read_comparisons(results / "none", OURS) == ()


def test_the_report_shows_values_differences_and_the_command(demo_facts: ReportFacts, results: Path) -> None:
    bare = render(demo_facts)
    assert "This run was not compared with others." in compared(bare) and "snakemake compare" in compared(bare)
    page = with_comparisons(bare, read_comparisons(results, OURS))
    assert with_comparisons(page, ()) == with_comparisons(bare, ())
    text = compared(page)
    assert "was not compared" not in text
    # 100 pairs, 25 of which rise by 1: mean 0.25, s = sqrt(100 * 0.25 * 0.75 / 99), half-width 1.984 * s / 10
    for expected in (
        "quiz acc 100 100 0.500 [0.404, 0.596] 0.750 [0.657, 0.825]",
        "quiz acc 0.2500 [0.1636, 0.3364] < 0.001",
        "better",
        f"{OTHER} differs from {OURS} in recipe.learning_rate.peak=0.002",
        f"extra: acc: not in {OTHER}",
        f"snakemake compare --config runs=[{OURS},{OTHER}]",
        f"Source: compare/aaaaaaaaaaaa/compare.json , of snakemake compare --config runs=[{OURS},{OTHER}]",
    ):
        assert expected in text, (expected, text)
    assert page.count('href="#compared"') == 1


def test_a_page_alone_holds_it_too(results: Path, tmp_path: Path) -> None:
    (found,) = read_comparisons(results, OURS)
    write_comparison(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script|https?://|url\(|@import| src=", page) and "default-src 'none'" in page
    assert "0.2500 [0.1636, 0.3364]" in words(page)


def test_what_could_not_be_given_is_said(demo_comparison: Comparison) -> None:
    row = demo_comparison.rows[0]
    (name, each), *_ = row.differences.items()
    bare = replace(each, difference=Estimate(-0.5), p=None, detectable=None, found=None)
    shown = section(replace(demo_comparison, rows=(replace(row, differences={**row.differences, name: bare}),)))
    assert shown["others"][0].rows[0][2:] == ("\N{MINUS SIGN}0.5000", "not computed", "none", "none", "nothing")
    assert [name in figure.caption for figure in shown["figures"]] == [True, False]


def test_names_from_a_file_stay_words(demo_facts: ReportFacts, demo_comparison: Comparison) -> None:
    attack = '"><script>alert(1)</script>'
    row = replace(demo_comparison.rows[0], task=attack, metric=attack)
    hostile = replace(demo_comparison, rows=(row,), adjusted=attack, left_out=(attack,), source=attack)
    assert "<script" not in with_comparisons(render(demo_facts), (hostile,))
