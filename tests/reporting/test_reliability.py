"""The section on reliability: every figure of the ledger, faults as they were named, and nothing where nothing is."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.reporting.facts import Fault, Reliability, ReportFacts
from headrace.reporting.page import render
from headrace.reporting.reliability import MOST_FAULTS, RELIABILITY, read_reliability, section, story
from headrace.training import ledger
from headrace.training.ledger import Ledger, figures, read

CALM = Reliability(0.97, 1.0, 970.0, 1000.0, 8000, 8000, None, 1, 1, 0, 5, 2.5, {"steps not applied": 0}, (), ())
RECOVERY = {"detect": 1.25, "restart": 6.0, "load": 0.5, "replay": 3.0, "total": 10.75}
FAULT = Fault(41, 1, "killed", "was killed by SIGKILL during 1F3 of <step> 42")
STORMY = replace(
    CALM,
    goodput=0.875,
    recovery=RECOVERY,
    attempts=4,
    sittings=2,
    restarts=2,
    faults=(FAULT, replace(FAULT, step=77, cause="hung", what="hung in 0B1 for 26 s")),
    remarkable={"steps not applied": 3, "rollbacks": 0},
    slow_ranks=(1,),
)


def words_of(facts: ReportFacts, found: Reliability) -> str:
    html = render(replace(facts, reliability=found))
    part = html[html.index('<section id="reliability"') : html.index('<section id="formats"')]
    return " ".join(re.sub("<[^>]*>", " ", part).replace("\xa0", " ").split())


def test_a_report_without_a_ledger_has_no_section(demo_facts: ReportFacts) -> None:
    assert "reliability" not in re.findall('id="([a-z-]+)"', render(demo_facts))


def test_an_undisturbed_run_says_so(demo_facts: ReportFacts) -> None:
    said = words_of(demo_facts, CALM)
    assert "Nothing interrupted the training run." in said
    assert "97 % 16 min 10 s of progress in 16 min 40 s" in said
    assert "training waited 2.5 s for them, 0.25 % of the time" in said
    assert "What ended attempts" not in said and "Mean time to recover" not in said


def test_a_disturbed_run_shows_what_it_cost(demo_facts: ReportFacts) -> None:
    said = words_of(demo_facts, STORMY)
    for words in (
        "Twice a fault ended an attempt to train and once the stage itself was ended and run again; it went on",
        "87.5 % of 8.00k computed tokens reached the final weights",
        "Mean time to recover, over 2 faults",
        "from the fault until it was noticed 1.2 s",
        "from the fault until training was where it had been 11 s",
        "41 1 killed was killed by SIGKILL during 1F3 of &lt;step&gt; 42",
        "77 1 hung hung in 0B1 for 26 s",
        "Steps not applied: 3. Slow ranks: 1.",
        "artifact/reliability.json",
    ):
        assert words in said, words
    assert "Rollbacks" not in said
    assert 'href="#reliability"' in render(replace(demo_facts, reliability=STORMY))


def test_faults_without_end_are_counted_and_not_listed() -> None:
    many = replace(STORMY, faults=(FAULT,) * (MOST_FAULTS + 7))
    drawn = section(many, "x")
    assert (len(drawn["faults"]), drawn["unlisted"]) == (MOST_FAULTS, 7)
    assert story(many).startswith(f"{MOST_FAULTS + 7} times a fault")


@pytest.mark.parametrize("faulty", [False, True])
def test_what_the_ledger_makes_is_what_the_report_reads(tmp_path: Path, faulty: bool) -> None:
    book = Ledger(tmp_path / ledger.NAME)
    book.write("attempt", {})
    book.write("resumed", {"step": 0, "tokens": 0, "load": 0.0})
    if faulty:
        book.write("failure", {"step": 3, "tokens": 30, "rank": 1, "cause": "killed", "what": "was killed"})
        book.write("restart", {"step": 3, "tokens": 30, **dict.fromkeys(ledger.PARTS, 1.0)})
    book.write("finished", {"step": 9, "tokens": 90})
    (tmp_path / RELIABILITY).write_text(json.dumps(figures(read(tmp_path / ledger.NAME))))
    found = read_reliability(tmp_path / RELIABILITY)
    assert found.tokens_computed == 90
    assert found.faults == ((Fault(3, 1, "killed", "was killed"),) if faulty else ())
    assert found.recovery == ({**dict.fromkeys(ledger.PARTS, 1.0), "total": 4.0} if faulty else None)
