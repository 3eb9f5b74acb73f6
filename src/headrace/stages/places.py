"""Where each stage's run lies, found from configuration alone: no file is written to know it.

Imports nothing heavy; the Snakefile, every stage and `headrace runs` use the same answer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config.schema import Config
from headrace.stages.table import fingerprint, slices


@dataclass(frozen=True)
class Place:
    """One stage's run directory and the slice of the configuration that names it."""

    stage: str
    slice: dict[str, Any]
    folder: Path

    @property
    def fingerprint(self) -> str:
        """The stage's fingerprint."""
        return self.folder.name

    @property
    def artifact(self) -> Path:
        """The finished result."""
        return self.folder / "artifact"

    @property
    def done(self) -> Path:
        """The file that Snakemake knows; it holds the manifest's hash."""
        return self.folder / "done"

    @property
    def log(self) -> Path:
        """The stage's log."""
        return self.folder / "log.txt"


def places(config: Config, sources: str) -> dict[str, Place]:
    """The place of every stage under `paths.results`; `sources` is the hash of the corpus' lock."""
    results = Path(config.paths.results)
    return {
        name: Place(name, stage_slice, results / name / fingerprint(stage_slice))
        for name, stage_slice in slices(config, sources).items()
    }
