"""Finished evaluations side by side: paired differences on the items that all of them were scored on.

Two figures with overlapping intervals may still differ beyond doubt, and two far apart may not: most of an interval is
how hard the items happen to be, which is the same for every model. So runs are compared item by item, and only by
figures of which every item's hash is the same in all runs; the others are left out, each with its reason, since runs
with another tokenizer or sequence length, whose held-out rows are cut elsewhere, still share their tasks. The first
run is what the others are compared with. A difference is `run - first`:

- bits per byte, overall and per kind of text: bootstrap over documents;
- tasks with a likelihood: bits per byte of the answers, the same with items (or their passages) in place of documents;
- tasks with a score per item: mean difference, clustered by passage where the task has passages.

P-values are adjusted by Holm's steps over all differences of the table that have one, since a reader looks at all.
`better` and `worse` are said where that adjusted value is below 5 %; anywhere else nothing was found, which is not
equality: the column beside it says how large a difference would have had to be. Everything speaks of other items;
whether another seed of training would give the same difference, only runs with other seeds can say.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.errors import UserError
from headrace.evaluation.statistics import (
    LEVEL,
    POWER,
    Difference,
    Estimate,
    Floats,
    clustered_mean,
    holm,
    mean_difference,
    proportion,
    ratio_difference,
    ratio_of_sums,
)

Entry = Mapping[str, Any]
Key = tuple[str, str]  # task and metric

BITS = "bits_per_byte"
BITS_METRIC = "bits per byte"
_MODEL = "model"  # `bits_per_byte.MODEL`; that module imports transformers, which takes seconds
_AGAIN = "evaluate all with the same corpus, tokenizer and evaluate.* settings"


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished evaluation: its fingerprint, `results.json`, the entries of `items.jsonl`, what sets it apart."""

    name: str
    results: Mapping[str, Any]
    entries: Sequence[Entry]
    differs: Sequence[str] = ()


@dataclass(frozen=True)
class _Measure:
    """One figure of one run, item by item; `sizes` are bytes where the figure is bits per byte, else None."""

    items: tuple[tuple[str, str], ...]  # name and hash
    clusters: tuple[str, ...]
    values: Floats
    sizes: Floats | None

    def estimate(self, resamples: int, seed: int) -> Estimate:
        if self.sizes is not None:
            return ratio_of_sums(self._by_cluster(self.values), self._by_cluster(self.sizes), resamples, seed)
        if np.isin(self.values, (0, 1)).all():
            return proportion(self.values.astype(int).tolist(), self.clusters)
        return clustered_mean(self.values, self.clusters)

    def minus(self, other: "_Measure", resamples: int, seed: int) -> Difference:
        """`other` has the same items in the same order."""
        difference = self.values - other.values
        if self.sizes is not None:
            bits, size = self._by_cluster(difference), self._by_cluster(self.sizes)
            return ratio_difference(bits, size, resamples, seed)
        return mean_difference(difference, self.clusters)

    def ordered_as(self, first: "_Measure") -> "_Measure | None":
        """The same items in the order of `first`; None where they are not the same ones."""
        ours, theirs = (sorted(range(len(measure.items)), key=measure.items.__getitem__) for measure in (self, first))
        if [self.items[place] for place in ours] != [first.items[place] for place in theirs]:
            return None
        order = np.empty(len(ours), dtype=np.int64)
        order[theirs] = ours
        sizes = None if self.sizes is None else self.sizes[order]
        return _Measure(first.items, tuple(self.clusters[place] for place in order), self.values[order], sizes)

    def _by_cluster(self, column: Floats) -> Floats:
        places = {cluster: place for place, cluster in enumerate(dict.fromkeys(self.clusters))}
        owner = np.array([places[cluster] for cluster in self.clusters])
        return np.bincount(owner, weights=column).astype(np.float64)


def compare(runs: Sequence[EvaluatedRun], resamples: int, seed: int = 0) -> dict[str, Any]:
    """The content of compare.json: at least two runs, the first of which the others are compared with.

    `left_out` names the figures that not all runs have on the same items, asked in the same way, each with its reason.
    Raises `UserError` where that leaves nothing to compare.
    """
    assert len(runs) >= 2
    shared, left_out = _shared(runs)
    if not shared:
        raise UserError(f"evaluate {', '.join(run.name for run in runs)}: nothing to compare: {_in_short(left_out)}")
    rows: list[dict[str, Any]] = []
    # A bootstrap cannot say less than one in so many, and Holm multiplies it by the number of differences.
    drawn = max(resamples, 2 * math.ceil(len(shared) * (len(runs) - 1) / (1 - LEVEL)))
    for (task, metric), own in shared.items():
        differences = [other.minus(own[0], drawn, seed) for other in own[1:]]
        values = [each.estimate(resamples, seed) for each in own]
        rows.append(
            {
                "task": task,
                "metric": metric,
                "higher_is_better": own[0].sizes is None,
                "items": len(own[0].items),
                "units": values[0].units,
                "values": {run.name: each.to_json() for run, each in zip(runs, values, strict=True)},
                "differences": {run.name: each.to_json() for run, each in zip(runs[1:], differences, strict=True)},
            }
        )
    tested = _judge(rows)
    return {
        "schema": 1,
        "first": runs[0].name,
        "runs": [{"name": run.name, "differs": list(run.differs)} for run in runs],
        "level": LEVEL,
        "power": POWER,
        "resamples": resamples,
        "resamples_of_differences": drawn,
        "adjusted": f"Holm over {tested} differences",
        "rows": rows,
        "left_out": [f"{task}: {metric}: {reason}" for (task, metric), reason in sorted(left_out.items())],
    }


def markdown(facts: Mapping[str, Any]) -> str:
    """compare.json as Markdown: values of every run, then each run's differences from the first."""
    names = [run["name"] for run in facts["runs"]]
    lines = ["# Runs compared", ""]
    for run in facts["runs"]:
        apart = ", ".join(f"`{key}`" for key in run["differs"]) or "no setting differs"
        lines.append(f"- `{run['name']}`: {'the others are compared with it' if run['name'] == names[0] else apart}")
    lines += ["", *_table(["task", "metric", "items", "units", *names], [_values(row, names) for row in facts["rows"]])]
    for name in names[1:]:
        lines += ["", f"## {name} - {facts['first']}", ""]
        lines += _table(
            ["task", "metric", "difference", "95 % interval", "p (Holm)", "detectable", "found"],
            [_differences(row, row["differences"][name]) for row in facts["rows"]],
        )
    lines += [
        "",
        f"Intervals are of 95 %, paired item by item. P-values: {facts['adjusted']}. Detectable: the true difference "
        f"that one such comparison finds with a probability of {100 * facts['power']:.0f} %. All of this speaks of "
        "other items, not of other seeds of training.",
    ]
    lines += ["", "Left out:", "", *(f"- {name}" for name in facts["left_out"])] if facts["left_out"] else []
    return "\n".join(lines) + "\n"


def _shared(runs: Sequence[EvaluatedRun]) -> tuple[dict[Key, list[_Measure]], dict[Key, str]]:
    """By figure, either the measures of all runs with their items in the first's order, or why there is none."""
    measured = [_measures(run) for run in runs]
    shared: dict[Key, list[_Measure]] = {}
    left_out: dict[Key, str] = {}
    for key in dict.fromkeys(key for own in measured for key in own):
        lacking = [run.name for run, own in zip(runs, measured, strict=True) if key not in own]
        if lacking:
            left_out[key] = f"not in {' and '.join(lacking)}"
            continue
        paired = [measured[0][key]]
        for run, own in zip(runs[1:], measured[1:], strict=True):
            found = _paired(key[0], runs[0], paired[0], run, own[key])
            if isinstance(found, str):
                left_out[key] = found
                break
            paired.append(found)
        else:
            shared[key] = paired
    return shared, left_out


def _in_short(left_out: Mapping[Key, str]) -> str:
    """Why nothing is left, in one line: the first reason stands for the others, which are mostly the same."""
    if not left_out:
        return "none has a task or held-out text"
    (task, _), reason = next(iter(left_out.items()))
    more = f" (figures left out besides it: {len(left_out) - 1})" if len(left_out) > 1 else ""
    return f"{task}: {reason}{more}; {_AGAIN}"


def _measures(run: EvaluatedRun) -> dict[Key, _Measure]:
    found: dict[Key, list[tuple[Entry, float, float | None]]] = {}
    for entry in run.entries:
        if "hash" not in entry:
            raise UserError(f"evaluate {run.name}: written before items carried hashes; run evaluate again")
        task = entry["task"]
        if task == BITS:
            row = (entry, float(entry["bits"][_MODEL]), float(entry["bytes"]))
            for name in (BITS, f"{BITS}, {entry['kind']}"):
                found.setdefault((name, BITS_METRIC), []).append(row)
            continue
        for metric, score in entry.get("scores", {}).items():
            found.setdefault((task, metric), []).append((entry, float(score), None))
        if "nats" in entry:
            row = (entry, float(entry["nats"]) / math.log(2), float(entry["bytes"]))
            found.setdefault((task, BITS_METRIC), []).append(row)
    kinds = [task for task, _ in found if task.startswith(f"{BITS}, ")]
    if len(kinds) == 1:  # all text is of one kind: the same figure twice
        del found[kinds[0], BITS_METRIC]
    return {key: _measure(rows) for key, rows in found.items()}


def _measure(rows: list[tuple[Entry, float, float | None]]) -> _Measure:
    sizes = [size for _, _, size in rows if size is not None]
    return _Measure(
        tuple((entry["item"], entry["hash"]) for entry, _, _ in rows),
        tuple(entry["unit"] for entry, _, _ in rows),
        np.array([value for _, value, _ in rows]),
        np.array(sizes) if sizes else None,
    )


def _paired(task: str, first: EvaluatedRun, ours: _Measure, run: EvaluatedRun, theirs: _Measure) -> _Measure | str:
    """`theirs` in the order of `ours`; the reason where the items, or how they were asked, are not the same."""
    ordered = theirs.ordered_as(ours)
    if ordered is None:
        apart = sorted(set(ours.items) ^ set(theirs.items)) or sorted(ours.items)
        return (
            f"other items in {run.name} ({len(theirs.items):,}) than in {first.name} ({len(ours.items):,}), "
            f"the first that differs is {apart[0][0]!r}"
        )
    name = task.partition(",")[0]
    definitions = [other.results["tasks"].get(name, {}).get("definition") for other in (first, run)]
    if definitions[0] != definitions[1]:
        return f"asked in another way (shots, prompt) in {run.name} than in {first.name}"
    return ordered


def _judge(rows: list[dict[str, Any]]) -> int:
    """Add Holm's adjusted p-value and what was found to every difference; returns how many could be tested."""
    tested = [(row, entry) for row in rows for entry in row["differences"].values() if entry["p"] is not None]
    for row in rows:
        for entry in row["differences"].values():
            entry |= {"p_holm": None, "found": None}
    for (row, entry), adjusted in zip(tested, holm([entry["p"] for _, entry in tested]), strict=True):
        entry["p_holm"] = adjusted
        if adjusted < 1 - LEVEL:
            entry["found"] = "better" if (entry["value"] > 0) == row["higher_is_better"] else "worse"
    return len(tested)


def _values(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    shown = [_with_interval(row["values"][name]) for name in names]
    return [row["task"], row["metric"], f"{row['items']:,}", f"{row['units']:,}", *shown]


def _differences(row: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    interval = "–" if entry["low"] is None else f"{entry['low']:+.4f} to {entry['high']:+.4f}"
    p = "–" if entry["p_holm"] is None else f"{entry['p_holm']:.3f}" if entry["p_holm"] >= 0.001 else "< 0.001"
    detectable = "–" if entry["detectable"] is None else f"{entry['detectable']:.4f}"
    return [row["task"], row["metric"], f"{entry['value']:+.4f}", interval, p, detectable, entry["found"] or "–"]


def _with_interval(entry: Mapping[str, Any]) -> str:
    if entry["low"] is None:
        return f"{entry['value']:.4f}"
    return f"{entry['value']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruled = ["---" if place < 2 else "---:" for place in range(len(head))]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (head, ruled, *rows)]
