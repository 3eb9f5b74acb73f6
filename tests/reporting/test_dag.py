"""Transitive reduction against brute force; every stage and every edge is drawn."""

from headrace.reporting.dag import direct_parents, draw_dag
from headrace.reporting.facts import ReportFacts, Stage
from headrace.reporting.svg import NARROW, WIDE


def plain_stage(name: str, *parents: str) -> Stage:
    return Stage(name, "0" * 12, parents, 1.0, "", "0" * 64, {}, f"/r/{name}")


def reachable(parents: dict[str, set[str]], start: str) -> set[str]:
    found, todo = set(), list(parents[start])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += parents[name]
    return found


def test_reduction_keeps_reachability_and_nothing_spare() -> None:
    stages = [
        plain_stage("a"),
        plain_stage("b", "a"),
        plain_stage("c", "a", "b"),
        plain_stage("d", "a"),
        plain_stage("e", "a", "c", "d"),
    ]
    full = {stage.name: set(stage.parents) for stage in stages}
    reduced = direct_parents(stages)
    assert reduced == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a"}, "e": {"c", "d"}}
    for name in full:
        assert reachable(reduced, name) == reachable(full, name)
        for parent in reduced[name]:
            without = {**reduced, name: reduced[name] - {parent}}
            assert reachable(without, name) != reachable(full, name)


def test_everything_is_drawn(demo_facts: ReportFacts) -> None:
    for width in (WIDE, NARROW):
        drawn = str(draw_dag(demo_facts.stages, width))
        assert all(stage.name in drawn and stage.fingerprint in drawn for stage in demo_facts.stages)
        assert drawn.count('class="edge') == sum(len(stage.parents) for stage in demo_facts.stages)
        assert "4 min 51 s" in drawn
