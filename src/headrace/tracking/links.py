"""`run.json`: who a tracked run is, what it read and what it made.

It is written when the run starts and again as it grows, and outlives any service: the mirror takes identity,
configuration and artifacts from it, and `sync` the links to the inputs, which W&B refuses to record offline.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

WandbMode = Literal["offline", "online", "disabled"]
Backend = Literal["wandb", "trackio"]


@dataclass
class RunRecord:
    """One tracked run. Everything in it is redacted before it comes here."""

    run_id: str  # <stage>-<fingerprint>; also the name of the artifact that the stage makes
    group: str
    job_type: str
    wandb: WandbMode  # of whichever back end
    project: str
    entity: str | None
    finish_seconds: float  # how long W&B may take to end
    config: dict[str, Any]
    inputs: list[dict[str, str]]  # {"name", "kind", "hash"} of each artifact that was read
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, str]] = field(default_factory=list)  # {"name", "kind", "hash", "file"} of each made
    exit_code: int | None = None  # None while it runs, or when it was killed
    backend: Backend = "wandb"

    @property
    def path(self) -> str:
        """[entity/]project/run_id, as W&B's public API names a run."""
        return "/".join(part for part in (self.entity, self.project, self.run_id) if part)

    def write(self, folder: Path) -> None:
        """Replace `run.json` in one step; raises `OSError`."""
        temporary = folder / f".{RUN_FILE}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")
            temporary.replace(folder / RUN_FILE)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read `run.json`."""
        return cls(**json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))


def alias(manifest_hash: str) -> str:
    """The W&B alias under which an artifact with this manifest hash is found again."""
    return manifest_hash.rpartition(":")[2][:16]
