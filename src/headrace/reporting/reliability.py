"""What interrupted the training run, what it cost, and what share of the time was progress: a section of the report."""

from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json
from headrace.reporting.facts import Fault, Reliability
from headrace.reporting.quantities import duration, exact

RELIABILITY = "reliability.json"
PARTS = {
    "detect": "from the fault until it was noticed",
    "restart": "until new ranks had found each other",
    "load": "reading the checkpoint",
    "replay": "the steps since that checkpoint, once more",
    "total": "from the fault until training was where it had been",
}
REMARKABLE = {
    "skipped_steps": "steps not applied",
    "spikes": "loss spikes",
    "rollbacks": "rollbacks",
    "corruptions": "silent corruptions found",
    "saves_failed": "saves that failed",
    "router_alarms": "alarms about routing",
}
MOST_FAULTS = 50
"""More are counted and not listed."""
_SAME = ("ettr", "goodput", "productive_seconds", "wall_seconds", "tokens_computed", "tokens_useful", "attempts",
         "sittings", "restarts", "saves", "stall_seconds")  # fmt: skip


def read_reliability(path: Path) -> Reliability:
    """The pretrain artifact's reliability.json, which holds the figures of its ledger, as facts."""
    facts = read_json(path)
    return Reliability(
        **{key: facts[key] for key in _SAME},
        recovery=facts["mttr"],
        remarkable={name: facts[key] for key, name in REMARKABLE.items()},
        slow_ranks=tuple(facts["slow_ranks"]),
        faults=tuple(Fault(**entry) for entry in facts["failures"]),
    )


def section(found: Reliability, source: str) -> dict[str, Any]:
    """All that the template of the section needs."""
    happened = {name: exact(count) for name, count in found.remarkable.items() if count}
    if found.slow_ranks:
        happened["slow ranks"] = ", ".join(map(str, found.slow_ranks))
    return {
        "found": found,
        "source": source,
        "story": story(found),
        "recovery": [(words, duration(found.recovery[part])) for part, words in PARTS.items()]
        if found.recovery
        else [],
        "happened": happened,
        "faults": found.faults[:MOST_FAULTS],
        "unlisted": max(0, len(found.faults) - MOST_FAULTS),
        "stall_share": found.stall_seconds / found.wall_seconds if found.wall_seconds else 0.0,
    }


def story(found: Reliability) -> str:
    """How often the run was interrupted, in a sentence."""
    if not found.faults and found.sittings == 1:
        return "Nothing interrupted the training run."
    parts = []
    if found.faults:
        parts.append(f"{_times(len(found.faults))} a fault ended an attempt to train")
    if found.sittings > 1:
        parts.append(f"{_times(found.sittings - 1)} the stage itself was ended and run again")
    return f"{' and '.join(parts)}; it went on from its newest good checkpoint.".capitalize()


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{exact(count)} times")
