"""The study's figures and sentences: what they say about numbers that are known, in the report and on a page alone."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.reporting.facts import PrecisionStudy, ReportFacts
from headrace.reporting.page import render, write_study
from headrace.reporting.precision import ablation_figure, difference_figure, sentence, whisker_figure


def words(page: str) -> str:
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    return " ".join(text.replace("\N{MINUS SIGN}", "-").split())


def test_the_page_stands_alone_and_holds_the_numbers(demo_study: PrecisionStudy, tmp_path: Path) -> None:
    write_study(demo_study, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script|https?://|url\(|@import| src=", page)
    assert "default-src 'none'" in page
    text = words(page)
    for expected in (
        "Precision study: FP8 - BF16",
        "Over 3 pairs the mean difference is +0.05 % [-0.04, 0.14]; it lies within 0.25 % with its whole interval.",
        "Largest mean difference at any step of the second half: 0.17 %.",
        "Spread of the BF16 runs from seed to seed: 0.60 %.",
        "no_promotion sums stay in Hopper's 14-bit accumulators +0.41 % +0.50 % +0.47 % no",
        "none: diverged none: diverged none: diverged 301",
        "linear layers BF16 E4M3",
        "pair-2-candidate FP8 init 2, data 2 4.2000",
    ):
        assert expected in text, expected
    assert "<b>2</b> threads" not in page  # escaped


def test_the_report_shows_the_study_where_it_has_one(demo_facts: ReportFacts, demo_study: PrecisionStudy) -> None:
    without, page = render(demo_facts), render(replace(demo_facts, study=demo_study))
    assert "precision" not in words(without).lower()
    assert 'id="precision"' in page
    assert '<a href="#precision">Precision study</a>' in page
    assert sentence(demo_study).replace("\N{MINUS SIGN}", "-") in words(page)


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("within", "it lies within 0.25 % with its whole interval."),
        ("mean within", "its interval reaches beyond; more pairs narrow it."),
        ("beyond", "it lies beyond 0.25 %."),
    ],
)
def test_the_sentence_follows_the_verdict(demo_study: PrecisionStudy, verdict: str, says: str) -> None:
    assert sentence(replace(demo_study, verdict=verdict)).endswith(says)


def test_a_run_that_diverged_is_named(demo_study: PrecisionStudy, tmp_path: Path) -> None:
    runs = (replace(demo_study.runs[0], diverged_at=17, validation_loss=None), *demo_study.runs[1:])
    gone = tuple(replace(row, mean=None) for row in demo_study.differences)
    broken = replace(
        demo_study, runs=runs, verdict="diverged", differences=gone, mean=(), band=(), spread=None, largest=None
    )
    assert sentence(broken) == "No difference can be given: pair-0-baseline at step 17 diverged."
    write_study(broken, tmp_path / "page.html")
    assert "None" not in words((tmp_path / "page.html").read_text())


def heights(figure: str, css: str) -> list[float]:
    """The y of every point of the paths of one class."""
    paths = re.findall(rf'<path d="([^"]+)" class="{css}"', figure)
    return [float(y) for path in paths for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]


def test_pairs_mean_interval_and_line_are_drawn_to_one_scale(demo_study: PrecisionStudy) -> None:
    figure = difference_figure(demo_study)
    assert figure is not None
    upper, lower = heights(figure.wide, "line tone5")[0], heights(figure.wide, "line tone5")[2]
    middle = heights(figure.wide, "line faint tone5")[0]
    assert middle == pytest.approx((upper + lower) / 2, abs=0.11)
    per_percent = (lower - upper) / 0.5
    last = heights(figure.wide, "line tone1")[-1]
    assert (middle - last) / per_percent == pytest.approx(100 * demo_study.mean[-1][1], abs=2e-3)
    assert figure.wide.count('class="line faint tone3"') == 3
    band = heights(figure.wide, "band tone1")
    edges = sorted((band[0], band[-1]))  # low and high of the first point
    assert edges[1] - edges[0] == pytest.approx(0.22 * per_percent, abs=0.3)


def test_an_ablation_that_diverged_ends_where_it_did(demo_study: PrecisionStudy) -> None:
    figure = ablation_figure(demo_study)
    assert figure is not None
    points = {row[0]: row[1] for row in figure.numbers}
    assert (points["no_promotion"], points["block_gradients"], points["FP8"]) == ("400", "300", "400")
    assert ablation_figure(replace(demo_study, ablations=())) is None


def test_measures_stand_beside_the_line_and_every_pair(demo_study: PrecisionStudy) -> None:
    figure = whisker_figure(demo_study)
    assert figure is not None
    assert figure.wide.count("<title>the line: 0.25</title>") == 2  # validation has no mean, and no row
    assert figure.wide.count("<title>one pair:") == 3 + 3
    assert "BF16 differs from seed to seed by 0.60 %" in figure.caption
