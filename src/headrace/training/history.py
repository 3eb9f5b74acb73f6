"""The log of a run, kept in its checkpoints: metrics by step, and how many tokens each expert received.

A run that was killed and goes on from a checkpoint computes some steps twice. The tracker's JSONL, which only ever
grows, then holds those steps twice (its reader takes the later row). The history here is saved and restored with the
weights, so it holds each step once and is what the run's artifact tells.

MaxVio is the load of the busiest expert over the mean load, less one (arXiv 2408.15664, section 4.1); 0 is balanced.
"""

from collections.abc import Mapping
from typing import Any

LOAD_POINTS = 100
"""Expert load is kept at about so many steps of a run: 58 layers of 256 experts are 15k numbers each time."""

Load = list[list[int]]  # tokens per expert, by layer


class History:
    """`rows`: one dict per logged step with `step`, `tokens` and metrics. `loads`: counts per layer at some steps."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.rows: list[dict[str, float]] = list(state["rows"]) if state else []
        self.load_steps: list[int] = list(state["load_steps"]) if state else []
        self.loads: list[Load] = list(state["loads"]) if state else []

    def state(self) -> dict[str, Any]:
        """The whole log as JSON, a copy that does not grow with it."""
        return {"rows": list(map(dict, self.rows)), "load_steps": list(self.load_steps), "loads": list(self.loads)}

    def add(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Log `metrics` after `step` steps and `tokens` tokens; more metrics of the same step join its row."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step, "tokens": tokens})
        self.rows[-1].update(metrics)

    def add_load(self, step: int, counts: Load) -> None:
        """Keep the tokens that each expert received during `step`."""
        self.load_steps.append(step)
        self.loads.append(counts)

    def last(self, metric: str) -> float | None:
        """The newest value of a metric, or None where it was never logged."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def recent_mean(self, metric: str, rows: int) -> float | None:
        """Mean of a metric over the newest `rows` rows that have it."""
        values = [row[metric] for row in self.rows if metric in row][-rows:]
        return sum(values) / len(values) if values else None


def wants_load(step: int, steps: int) -> bool:
    """Whether the expert load of `step` (counted from 1) is kept."""
    return step in (1, steps) or step % max(1, steps // LOAD_POINTS) == 0


def max_violation(load: Load) -> list[float]:
    """MaxVio of each layer."""
    return [max(counts) * len(counts) / sum(counts) - 1 for counts in load]


def shares(load: Load) -> list[list[float]]:
    """The share of its layer's tokens that each expert received; each layer sums to 1."""
    return [[count / sum(counts) for count in counts] for counts in load]
