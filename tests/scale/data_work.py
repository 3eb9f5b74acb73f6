"""The data stages as a cluster runs them: programs side by side, some of them killed, on as much text as is wanted.

write_text(folder, 200)                     200 MB in Parquet files, no two documents equal
work = Work(folder, results, workers=2)
work.run(kills=10, seed=0)                  corpus scans, corpus, tokenizer, plan, shards, dataset
work.done                                   the dataset's hash: equal hashes are equal bytes
work.most_memory                            of any process, in bytes
work.most_together                          of all processes alive at once, in bytes
work.leftovers                              files and folders that somebody was writing when he was killed
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.config.compose import load
from headrace.config.shards import training_shards
from headrace.corpus.pieces import pieces
from headrace.corpus.sources import known_lock
from headrace.stages.batch_names import EXTRA_SHARDS, batch_names
from headrace.stages.places import places

FILE_BYTES = 250_000_000
GROUP_BYTES = 4_000_000
LARGEST = 200_000  # bytes of a document


def write_text(folder: Path, megabytes: float) -> int:
    """Write Parquet files of this environment's text, over and over, every copy changed; returns the documents."""
    folder.mkdir(parents=True)
    left, count, number = int(megabytes * 1e6), 0, 0
    documents = _changed()
    while left > 0:
        wanted = min(left, FILE_BYTES)
        path, schema = folder / f"part-{number:04d}.parquet", pa.schema([("text", pa.string())])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while wanted > 0:
                texts: list[str] = []
                size = 0
                while size < min(GROUP_BYTES, wanted):
                    texts.append(next(documents))
                    size += len(texts[-1].encode())
                writer.write_table(pa.table({"text": texts}, schema=schema))
                wanted, left, count = wanted - size, left - size, count + len(texts)
        number += 1
    return count


def _changed() -> Iterator[str]:
    """Endless documents: in copy k of a file its lines are rotated, and each tenth line names the copy."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace")[:LARGEST] for path in files if path.is_file()]
    for copy in range(1_000_000):
        for text in texts:
            lines = text.splitlines()
            if len(lines) > 10:
                turned = lines[copy % len(lines) :] + lines[: copy % len(lines)]
                turned[::10] = [f"{line}  # copy {copy}" for line in turned[::10]]
                yield "\n".join(turned)


@dataclass
class Work:
    """One run of the data stages over `text`, with results of its own, by so many processes at once."""

    text: Path
    results: Path
    workers: int
    settings: Sequence[str] = ()
    most_memory: int = 0
    most_together: int = 0  # looked at every 20 ms; pages that processes share count for each
    kills: int = 0
    seconds: float = 0.0
    _chance: random.Random = field(default_factory=random.Random)
    _kill_at: list[float] = field(default_factory=list)
    _killed: Counter[str] = field(default_factory=Counter)

    @property
    def words(self) -> list[str]:
        """The overrides of every program."""
        return [
            "experiment=tiny",
            "corpus=files",
            f"corpus.paths=[{self.text}/*.parquet]",
            "corpus.validation_fraction=0.001",
            "corpus.heldout_fraction=0.001",
            "tokenizer.vocab_size=4096",
            "tokenizer.sample_bytes=10000000",
            "tracking=disabled",
            f"paths.results={self.results}",
            *self.settings,
        ]

    def run(self, kills: int = 0, seed: int = 0, within: float = 60.0) -> None:
        """Run everything to its end; so many processes are killed at random moments of the first `within` seconds."""
        self._chance, began = random.Random(seed), time.monotonic()
        self._kill_at = sorted(began + within * self._chance.random() for _ in range(kills))
        config = load(self.words)
        self._together([["corpus_scans", batch] for batch in self._scans()])
        self._together([["corpus"]])
        self._together([["tokenizer"]])
        self._together([["tokenize_plan", "00000"]])
        shards = batch_names(training_shards(config.tokens) + EXTRA_SHARDS, config.launch.shards_per_job)
        self._together([["tokenize_shards", batch] for batch in shards])
        self._together([["tokenize"]])
        self.seconds = time.monotonic() - began

    @property
    def done(self) -> str:
        """The hash of the finished dataset's manifest."""
        config = load(self.words)
        return places(config, known_lock(config).hash)["tokenize"].done.read_text()

    @property
    def content(self) -> dict[str, str]:
        """sha256 of every file of the dataset, read anew."""
        config = load(self.words)
        folder = places(config, known_lock(config).hash)["tokenize"].artifact
        found = {}
        for path in sorted(folder.iterdir()):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    @property
    def leftovers(self) -> list[str]:
        """What lies below the results and should not, once everything is finished."""
        found = self.results.rglob("*")
        return sorted(str(path) for path in found if path.name.endswith((".tmp", ".partial", ".ranges")))

    def _scans(self) -> list[str]:
        config = load(self.words)
        return batch_names(len(pieces(known_lock(config))), config.launch.pieces_per_job)

    def _together(self, programs: list[list[str]]) -> None:
        """Run programs, `workers` at once; one that was killed is run again."""
        waiting, running = programs[::-1], dict[int, tuple[list[str], subprocess.Popen[bytes]]]()
        while waiting or running:
            while waiting and len(running) < self.workers:
                program = waiting.pop()
                command = [sys.executable, "-m", f"headrace.stages.{program[0]}", *program[1:], *self.words]
                log = (self.results.parent / f"{self.results.name}.log").open("ab")
                started = subprocess.Popen(command, stdout=log, stderr=log)
                log.close()
                running[started.pid] = program, started  # kept, or the next start would wait for this one's end
            # Each by its number: pytest's process may have children of other makes.
            found = [reaped for pid in running if (reaped := os.wait4(pid, os.WNOHANG))[0]]
            if not found:
                self.most_together = max(self.most_together, sum(map(_resident, running)))
                self._perhaps_kill({pid: " ".join(program) for pid, (program, _) in running.items()})
                time.sleep(0.02)
            for pid, status, usage in found:
                waiting += self._ended(*running.pop(pid), status, usage.ru_maxrss * 1024)

    def _ended(self, program: list[str], process: subprocess.Popen[bytes], status: int, memory: int) -> list[list[str]]:
        """What is to be run again of a program that ended: itself, where it was killed."""
        self.most_memory = max(self.most_memory, memory)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            return [program]
        assert code == 0, f"{program} ended with {code}; see {self.results}.log"
        return []

    def _perhaps_kill(self, running: dict[int, str]) -> None:
        # A job gives up after three attempts without progress, and its first unit may take longer than kills leave it.
        victims = [pid for pid, program in running.items() if self._killed[program] < 2]
        if victims and self._kill_at and time.monotonic() >= self._kill_at[0]:
            self._kill_at.pop(0)
            victim = self._chance.choice(victims)
            os.kill(victim, signal.SIGKILL)
            self._killed[running[victim]] += 1
            self.kills += 1


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds now; 0 for one that has just ended."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()  # a zombie, which our child is until we wait, has zeros
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
