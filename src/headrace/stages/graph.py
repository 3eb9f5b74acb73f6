"""What the Snakefile needs to know: files and command lines of every stage, for one configuration.

Snakemake owns the graph, so the rules name their inputs themselves; this class only answers where a stage's files lie
and how its program is called. Every word of a command that comes from the user is quoted for the shell here, once.
"""

import shlex
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from headrace.config.compose import load, overrides_from
from headrace.config.schema import Config
from headrace.config.shards import training_shards
from headrace.corpus.pieces import count
from headrace.corpus.sources import checked_lock, known_lock
from headrace.errors import UserError
from headrace.stages.batch_names import EXTRA_SHARDS, batch_folder, batch_names, per_job
from headrace.stages.places import places
from headrace.training.trials import trials

_AGAIN = 75


class Graph:
    """Files and commands of all stages. `check_sources` compares the corpus' files with their lock (once a run)."""

    def __init__(self, snakemake_config: Mapping[str, Any], check_sources: bool) -> None:
        self._overrides = overrides_from(snakemake_config)
        self.config = load(self._overrides)
        lock, new = checked_lock(self.config, self._overrides) if check_sources else (known_lock(self.config), [])
        if new:
            command = shlex.join(["headrace", "index", *self._overrides])
            print(
                f"{len(new)} new source files, e.g. {new[0]}, are left out; `{command}` takes them in", file=sys.stderr
            )
        if check_sources and (unsought := _unsought(self.config)):
            print(
                f"evaluated, but not sought in training text: items of {', '.join(unsought)}; `headrace items` writes "
                "them down for corpus.contamination_items",
                file=sys.stderr,
            )
        self._lock, self.places = lock, places(self.config, lock.hash)

    def done(self, stage: str) -> str:
        """The one file that a stage's rule declares."""
        return str(self.places[stage].done)

    def log(self, stage: str) -> str:
        """The stage's log file."""
        return str(self.places[stage].log)

    def file(self, stage: str, name: str) -> str:
        """A file in a stage's run directory."""
        return str(self.places[stage].folder / name)

    def batch(self, stage: str, program: str, suffix: str) -> str:
        """A file of one job of a stage that is done in many; `{batch}` stands for which."""
        return self.file(stage, f"{self._batches(program)}/{{batch}}{suffix}")

    def scan_batches(self) -> list[str]:
        """The jobs that the sources are scanned in. One job's worth the corpus stage does by itself."""
        names = batch_names(self._pieces, per_job("corpus_scans", self.config.launch))
        return names if len(names) > 1 else []

    def corpus_minutes(self) -> int:
        """How long the job may take that selects from all scans and extracts text: see docs/data.md."""
        return 120 + self._pieces // 600

    def shard_batches(self) -> list[str]:
        """The jobs that the token shards are made in."""
        units = training_shards(self.config.tokens) + EXTRA_SHARDS
        return batch_names(units, per_job("tokenize_shards", self.config.launch))

    def command(self, stage: str) -> str:
        """The shell line of a stage. Exit 75 means "run me again"; what that takes, `launch.rerun` says."""
        program = f"{_quote(sys.executable)} -m headrace.stages.{stage} {self._arguments()}"
        return self._until_done(program) + _declare(_quote(self.done(stage)), "done")

    def batch_command(self, stage: str, program: str) -> str:
        """The shell line of one job of a stage that is done in many; Snakemake fills in the wildcard."""
        line = f"{_quote(sys.executable)} -m headrace.stages.{program} {{wildcards.batch:q}} {self._arguments()}"
        made = f"{_quote(self.file(stage, self._batches(program)))}/{{wildcards.batch:q}}.done"
        return self._until_done(line) + _declare(made, "done")

    def page_command(self, stage: str, page: str) -> str:
        """The shell line of a stage that declares its page too."""
        return self.command(stage) + _declare(_quote(self.file(stage, page)), "html")

    def study_input(self, _wildcards: object) -> str:
        """The precision study's parent. Asked only where the study is wanted: an impossible one is refused here."""
        trials(self.config)
        return self.done("tokenize")

    def study(self) -> list[str]:
        """The precision study where the report reads it."""
        return [self.done("precision_study")] if self.config.study.in_report else []

    def sync_log(self) -> str:
        """The log of `snakemake sync`."""
        return f"{self.config.paths.results}/sync.log"

    def sync_command(self) -> str:
        """The shell line of `snakemake sync`."""
        return f"{_quote(sys.executable)} -m headrace.cli sync {self._arguments()} 2>&1 | tee {{log:q}}"

    def compare_log(self) -> str:
        """The log of `snakemake compare`."""
        return f"{self.config.paths.results}/compare.log"

    def compare_command(self, runs: list[str] | str | float | None) -> str:
        """The shell line of `snakemake compare`; `runs`, as Snakemake read them, name runs of evaluate."""
        named = ",".join(runs) if isinstance(runs, list) else runs
        words = " ".join([_quote(f"runs=[{named}]"), self._arguments()])
        return f"{_quote(sys.executable)} -m headrace.stages.compare {words} 2>&1 | tee {{log:q}}"

    @property
    def ablates(self) -> bool:
        """Whether `experiment=ablations` was asked for, which without a target means all of its runs."""
        return "experiment=ablations" in self._overrides

    def ablations_log(self) -> str:
        """The log of `snakemake ablations`."""
        return f"{self.config.paths.results}/ablations.log"

    def ablations_command(self) -> str:
        """The shell line of `snakemake ablations`."""
        return f"{_quote(sys.executable)} -m headrace.stages.ablations {self._arguments()} 2>&1 | tee {{log:q}}"

    @cached_property
    def _pieces(self) -> int:
        return count(self._lock)

    def _batches(self, program: str) -> str:
        return batch_folder(program, per_job(program, self.config.launch))

    def _arguments(self) -> str:
        return " ".join(_quote(word) for word in self._overrides)

    def _until_done(self, command: str) -> str:
        again = {
            "loop": f"[ $code -eq {_AGAIN} ] || exit $code",
            "slurm": f"[ $code -eq {_AGAIN} ] || exit $code; scontrol requeue $SLURM_JOB_ID; sleep 600",
        }[self.config.launch.rerun]
        return f"while true; do code=0; {command} || code=$?; [ $code -ne 0 ] || break; {again}; done"


def _unsought(config: Config) -> list[str]:
    """The evaluation's tasks of which the corpus stage seeks no items."""
    tasks = [*config.evaluate.tasks, *(task.task for task in config.evaluate.harness)]
    sought = set[str](config.corpus.contamination_tasks)
    if config.corpus.contamination_items and not sought.issuperset(tasks):
        from headrace.corpus.item_files import read_items  # imports numpy

        try:
            sought |= {item.id.partition("/")[0] for item in read_items(config.corpus.contamination_items)}
        except UserError:  # the corpus stage says so, if it has to read them
            return []
    return [task for task in tasks if task not in sought]


def _declare(made: str, output: str) -> str:
    """Without a shared file system Snakemake expects a declared file elsewhere than the stage writes it."""
    return f"; [ {made} -ef {{output.{output}:q}} ] || cp {made} {{output.{output}:q}}"


def _quote(word: str) -> str:
    """Quote for the shell, and for Snakemake's formatting, which reads braces."""
    return shlex.quote(word).replace("{", "{{").replace("}", "}}")
