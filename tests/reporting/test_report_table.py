"""The closing table: plain text, at most 100 columns, aligned, honest about baselines."""

import re
from dataclasses import replace

from headrace.reporting.facts import Baseline, Estimate, ReportFacts
from headrace.reporting.table import WIDTH, summary_table


def test_it_says_what_matters(demo_facts: ReportFacts) -> None:
    table = summary_table(demo_facts)
    assert re.search(r"bits per byte +2\.104 +\[2\.056, 2\.155\]", table)
    assert re.search(r"bigram +2\.398 +the model is better by 0\.294", table)
    assert re.search(r"trigram +2\.141 +not told apart", table)
    assert re.search(r"xz -9 +1\.953 +the model is worse by 0\.151", table)
    assert demo_facts.report_path in table and "train 4.162, validation 4.217" in table


def test_width_and_alignment(demo_facts: ReportFacts) -> None:
    assert demo_facts.publication is not None
    far = replace(demo_facts, report_path="/" + "deep/" * 60 + "report.html", title="t" * 300)
    for facts in (demo_facts, far):
        lines = summary_table(facts).splitlines()
        assert max(map(len, lines)) <= WIDTH == 100
        assert not any(line != line.rstrip() or "\x1b" in line or "\t" in line for line in lines)
    column = {
        re.match(r" *\S+( \S+)*  +", line).end()
        for line in summary_table(demo_facts).splitlines()[2:]
        if "─" not in line
    }  # type: ignore[union-attr]
    assert len(column) == 1
    assert far.report_path in re.sub(r"\n *", "", summary_table(far))  # cut into lines, never shortened


def test_missing_parts_are_left_out(demo_facts: ReportFacts) -> None:
    table = summary_table(replace(demo_facts, training=None, evaluation=None, publication=None))
    assert "loss" not in table and "bits" not in table
    assert demo_facts.results_folder in table


def test_without_intervals_nothing_is_claimed(demo_facts: ReportFacts) -> None:
    assert demo_facts.evaluation is not None
    scores = tuple(
        replace(
            score,
            model=Estimate(score.model.value),
            baselines={"bigram": Baseline(9.0, Estimate(-7.0)), "xz -9": Baseline(0.1)},
        )
        for score in demo_facts.evaluation.bits_per_byte
    )
    table = summary_table(replace(demo_facts, evaluation=replace(demo_facts.evaluation, bits_per_byte=scores)))
    assert table.count("not told apart") == 2 and "better" not in table and "worse" not in table
