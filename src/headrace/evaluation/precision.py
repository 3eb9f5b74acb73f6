"""From the runs of a precision study to `study.json`: what is compared with what, and the line that says how it ended.

Handed the finished runs in JSON (losses of every step, speeds, where they ran), it smooths their curves, compares them
by `paired_curves`, and keeps at most `POINTS` points of each curve. Relative differences are fractions: 0.0025 is the
report's 0.25 %. Validation losses are measured on the same rows in every run, whatever its seeds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.evaluation.paired_curves import (
    LINE,
    Floats,
    compare,
    finite,
    mean_interval,
    relative_difference,
    relative_spread,
    second_half,
    smooth,
)
from headrace.evaluation.statistics import Estimate

POINTS = 400
"""Points of a curve that are kept."""
PAIR = ("baseline", "candidate")
"""The roles that make a pair; any other role is an ablation's name."""
VERDICTS = ("within", "mean within", "beyond", "diverged")
"""The interval within the line; the mean only; neither; not to be told since a run diverged."""


def study_facts(runs: Sequence[dict[str, Any]], smoothing: float, tokens: Sequence[int]) -> dict[str, Any]:
    """The content of study.json; `tokens` are those seen after each step.

    A run: `name`, `role` (baseline, candidate or an ablation), `pair`, `format`, `losses` (one per step, None where not
    finite), `validation_loss`, `diverged_at`, and anything else that is to be kept of it.
    """
    steps = len(tokens)
    curves = {run["name"]: smooth(run["losses"], smoothing, steps) for run in runs}
    baselines, candidates = _of(runs, "baseline"), _of(runs, "candidate")
    compared = compare(_stack(curves, baselines), _stack(curves, candidates))
    validation = relative_difference(_validation(candidates), _validation(baselines))
    ablations = [run for run in runs if run["role"] not in PAIR]
    against = {run["role"]: relative_difference(curves[run["name"]], curves[baselines[0]["name"]]) for run in ablations}
    kept = np.unique(np.linspace(0, steps - 1, min(POINTS, steps)).round().astype(int))

    def thin(curve: Floats) -> list[float | None]:
        return [finite(value) for value in curve[kept]]

    return {
        "baseline": baselines[0]["format"],
        "candidate": candidates[0]["format"],
        "line": LINE,
        "smoothing": smoothing,
        "pairs": len(baselines),
        "steps": steps,
        "tokens": tokens[-1],
        "difference": {
            "second_half": _json(compared.second_half, compared.second_half_each),
            "end": _json(compared.end, compared.end_each),
            "validation": _json(mean_interval(validation), tuple(map(finite, validation))),
            "largest": compared.largest,
            "verdict": verdict(compared.second_half),
        },
        "spread": {"second_half": compared.spread, "validation": relative_spread(_validation(baselines))},
        "ablations": {
            run["role"]: {
                "second_half": finite(float(second_half(against[run["role"]]))),
                "end": finite(float(against[run["role"]][-1])),
                "validation": finite(float(relative_difference(_validation([run]), _validation(baselines[:1]))[0])),
                "diverged_at": run["diverged_at"],
            }
            for run in ablations
        },
        "curves": {
            "tokens": [tokens[step] for step in kept],
            "mean": thin(compared.band.mean),
            "low": thin(compared.band.low),
            "high": thin(compared.band.high),
            "each": [thin(curve) for curve in compared.each_PS],
            "ablations": {name: thin(curve) for name, curve in against.items()},
            "losses": {name: thin(curve) for name, curve in curves.items()},
        },
        "runs": [{key: value for key, value in run.items() if key != "losses"} for run in runs],
    }


def verdict(difference: Estimate | None) -> str:
    """One of `VERDICTS`."""
    if difference is None:
        return "diverged"
    assert difference.low is not None and difference.high is not None
    if difference.low >= -LINE and difference.high <= LINE:
        return "within"
    return "mean within" if abs(difference.value) <= LINE else "beyond"


def headline(facts: dict[str, Any]) -> str:
    """How the study ended, in one line."""
    names = f"{facts['candidate']} - {facts['baseline']}"
    difference, spread = facts["difference"]["second_half"], facts["spread"]["second_half"]
    if difference["value"] is None:
        compared = [run for run in facts["runs"] if run["role"] in PAIR]
        stopped = [run["name"] for run in compared if run["diverged_at"] is not None]
        return f"{names}: no difference, since {' and '.join(stopped)} diverged"
    value, low, high = (f"{100 * difference[key]:+.2f}" for key in ("value", "low", "high"))
    return (
        f"{names}: {value} % [{low}, {high}] over {facts['pairs']} pairs; line {100 * facts['line']:.2f} %; "
        f"seed spread {100 * spread:.2f} %"
    )


def side_by_side(baseline: Sequence[dict[str, str]], candidate: Sequence[dict[str, str]]) -> list[list[str]]:
    """Rows [what, format in the baseline, format in the candidate] of two tables of {"what", "format"}."""
    before, after = ({row["what"]: row["format"] for row in rows} for rows in (baseline, candidate))
    return [[what, before.get(what, ""), after.get(what, "")] for what in {**after, **before}]


def _of(runs: Sequence[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    return sorted((run for run in runs if run["role"] == role), key=lambda run: run["pair"])


def _stack(curves: dict[str, Floats], runs: Sequence[dict[str, Any]]) -> Floats:
    return np.stack([curves[run["name"]] for run in runs])


def _validation(runs: Sequence[dict[str, Any]]) -> Floats:
    values = [run["validation_loss"] if run["diverged_at"] is None else None for run in runs]
    return np.array([np.nan if value is None else value for value in values])


def _json(estimate: Estimate | None, each: Sequence[float | None]) -> dict[str, Any]:
    shown = {"value": None, "low": None, "high": None, "units": len(each)} if estimate is None else estimate.to_json()
    return {**shown, "each": list(each)}
