"""A working folder in which the real snakemake runs the repository's Snakefile, and cheap copies of finished stages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CANARIES = {"HF_TOKEN": "hf_" + "CanaryForHeadrace" * 2, "WANDB_API_KEY": "c0ffee" * 6 + "c0ff"}
STAGES = ("corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate", "publish", "report")


class Project:
    """A working folder in which snakemake runs the repository's Snakefile."""

    def __init__(self, folder: Path, snakefile: Path = ROOT / "Snakefile") -> None:
        self.folder, self.snakefile = folder, snakefile

    def command(self, *words: str, settings: str = "", config: tuple[str, ...] = ("experiment=tiny",)) -> list[str]:
        chosen = [*config, *([f"set={settings}"] if settings else [])]
        place = ["--snakefile", str(self.snakefile), "--directory", str(self.folder)]
        return [sys.executable, "-m", "snakemake", *words, *place, "--config", *chosen]

    def run(self, *words: str, timeout: float = 420, **keywords: object) -> subprocess.CompletedProcess[str]:
        command = self.command(*words, **keywords)  # type: ignore[arg-type]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, **CANARIES}
        )

    def start(self, *words: str, **keywords: object) -> subprocess.Popen[str]:
        command = self.command(*words, **keywords)  # type: ignore[arg-type]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **CANARIES}
        )

    def planned(self, *words: str, **keywords: object) -> list[str]:
        """Rules that a dry run would execute, in its order; every one must come with a reason."""
        result = self.run(*words, "--dry-run", **keywords)
        assert result.returncode == 0, result.stderr + result.stdout
        lines = (result.stdout + result.stderr).splitlines()
        jobs = [line.split(": ")[1] for line in lines if line.startswith("Job ")]
        assert len([line for line in lines if line.startswith("Reason: ")]) == len(jobs)
        return jobs

    def place(self, stage: str) -> Path:
        return (self.folder / "results" / "latest" / stage).resolve()


def copy_of(project: Project, folder: Path, stages: tuple[str, ...]) -> Project:
    """Hard links of some finished stages, times kept, as if they had been run in `folder`."""
    for name in (*stages, "locks"):
        shutil.copytree(
            project.folder / "results" / name,
            folder / "results" / name,
            copy_function=_link,
            symlinks=True,
            ignore=shutil.ignore_patterns("*lease*", ".*.tmp"),  # another worker may run a stage there
        )
    return Project(folder)


def _link(source: str, target: str) -> str:
    # What a run appends to or replaces in place must not be shared between copies.
    own = Path(source).suffix in {".jsonl", ".txt", ".json", ".lock", ".seen", ".done"} or Path(source).name == "done"
    (shutil.copy2 if own else os.link)(source, target)
    return target
