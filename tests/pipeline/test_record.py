"""The record of what a step computed: what is in it, that it changes nothing, and how two of them are compared."""

import pytest
import torch

from headrace.pipeline.record import Difference, Entry, Record, first_difference
from headrace.pipeline.simulate import Costs, simulate
from pipeline_runs import ALPHA, MTP, configuration, engine, figures, numerics_of, rows

LABELS = {
    "F": {"embedding", "layer", "attention", "experts", "head", "MTP join", "MTP head", "output", "what arrived"},
    "B": {"input gradient", "output", "weight gradients", "what arrived"},
    "I": {"input gradient", "output", "what arrived"},
    "W": {"output", "weight gradients", "what arrived"},
}


def _entry(action="0F0", start=0.0, label="output", digest=1):
    return Entry(action, start, label, digest)


def test_where_two_records_part():
    one = [_entry(digest=3), _entry("0B0", 1.0), _entry("0B0", 1.0, "weight gradients")]
    assert first_difference(one, list(one), 0) is None
    assert first_difference(one, [*one[:2], _entry("0B0", 1.0, "weight gradients", 9)], 4) == Difference(
        1.0, 1, 4, "0B0", "weight gradients"
    )
    assert first_difference(one, [_entry(digest=4), *one[1:]], 0) == Difference(0.0, 0, 0, "0F0", "output")
    assert first_difference(one[:2], one, 0) == Difference(1.0, 1, 0, "0B0", "weight gradients")


def test_the_least_of_all_differences_is_the_earliest_in_the_schedule():
    found = [Difference(2.0, 0, 0, "1F0", "output"), Difference(1.0, 4, 3, "0F1", "output")]
    found += [Difference(1.0, 3, 5, "0F1", "experts"), Difference(1.0, 3, 2, "0F1", "experts")]
    assert min(found).rank == 2
    assert [Difference(**one.json) for one in found] == found


def test_what_is_noted_and_when():
    record = Record()
    record.note("before", torch.ones(1))
    record.begin()
    record.action("0F0", 0.5)
    record.note("a", [torch.ones(2), {"none": "of this"}, None, (torch.zeros(1),)])
    record.note("b", _entry())  # nothing in it
    first, second = record.end()
    assert (first.action, first.start, first.label, second.label) == ("0F0", 0.5, "a", "b")
    record.note("after", torch.ones(1))
    record.begin()
    assert record.end() == []


@pytest.mark.parametrize("schedule", ["zb_v", "dualpipe_v"])
def test_a_record_holds_every_action_and_changes_nothing(schedule):
    config = configuration(model={"num_hidden_layers": 2}, schedule=schedule)
    running, batch = engine(config, numerics_of("fp32", config)), rows(config, count=3)

    def step():
        losses = running.step(batch, MTP, ALPHA, "step 1")
        gradients = [piece.tensor.grad.clone() for piece in running.reduction.pieces]
        running.recycle()
        return figures(losses), gradients

    (plain, expected), _ = step(), running.record.begin()
    recorded, gradients = step()
    entries = running.record.end()
    assert recorded == plain
    assert all(map(torch.equal, gradients, expected))
    spans = simulate(running.schedule(3), Costs()).spans
    assert list(dict.fromkeys((e.action, e.start) for e in entries)) == [(s.action, s.start) for s in spans]
    for kind, labels in LABELS.items():
        assert {entry.label for entry in entries if entry.action[1] == kind} <= labels
    assert {"attention", "experts", "input gradient", "weight gradients"} <= {entry.label for entry in entries}
    running.record.begin()
    step()
    assert first_difference(entries, running.record.end(), 0) is None
