"""The product under fire: `pretrain` through its door, in its own mode (FP8, DualPipe, 2 ranks), as users start it.

    made = tokenized(...)                    one corpus for all
    product = Product.fresh(made, folder)    a run of its own on that corpus
    stage = product.start()                  one process of the stage; its ranks are `stage.ranks()`
    ...                                      something bad happens
    product.differences(undisturbed)         what is not bitwise equal, sentence by sentence; [] is what we want

Nothing here reaches into the product: faults come as signals, limits, mounts and network rules from outside, or, where
only the inside can do it, from `injected/sitecustomize.py`, which Python imports by itself when it lies on its path.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.stages.places import Place, places
from headrace.tracking.journal import read_lines

T = TypeVar("T")

SETTINGS = (
    "experiment=tiny", "tracking=disabled", "tracking.log_every=1", "corpus=files", "corpus.validation_fraction=0.2",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "precision=fp8", "precision.optimizer_moments=bf16",
    "model.n_routed_experts=4", "model.n_group=2", "model.topk_group=1", "model.num_experts_per_tok=1",
    "model.num_attention_heads=1", "recipe.sequence_length=16", "recipe.batch_sequences=4",
    "recipe.batch_ramp=null", "recipe.extensions=[]", "tokens.row_lengths=[16,32]", "recipe.ema_decay=0.9",
    "train.validate_every=10", "train.validation_rows=2", "train.rollback_after=2", "launch.threads=1",
    "train.loss_spike.policy=rollback", "train.loss_spike.window=4",
    "launch.device=cpu", "recipe.learning_rate.peak=2.2e-4", "recipe.optimizer.muon_learning_rate=1.5e-3",
    "recipe.learning_rate.final=2.2e-5", "recipe.learning_rate.tail=[]",
)  # fmt: skip
"""Small and quick, with every part: two layers, of which one has experts, and MTP; emulated FP8 is what takes time.

The rates are V3's. At the demo's, ten times as high, losses under other layouts drift to 1e-3 within 15 to 19 steps, in
FP32 too.
"""
STEP_TOKENS = 16 * 4
EXTENDED = (
    "recipe.extensions=[{name: context_2x, steps: 6, sequence_length: 32, batch_sequences: 4, learning_rate: 3e-5, "
    "rope_scaling: {type: yarn, factor: 2.0, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0, "
    "original_max_position_embeddings: 16}}]"
)
"""A second phase of 6 steps, for which the ranks are started anew."""
DUALPIPE = ("parallel=dualpipe", "parallel.microbatch=1", "checkpoint.interval=4", "checkpoint.keep=1000")
"""Microbatches are the same in all layouts: on a CPU each product of a weight gradient is rounded to BF16."""
INJECTED = Path(__file__).with_name("injected")
RANKS = "headrace.training.on_rank"

MEASURED = frozenset({"seconds", "tokens_per_second", "mfu", "gemm_peak_flops"})
"""What a clock made: the only values in which two runs of one configuration may differ."""
NOT_OF_THE_MODEL = frozenset(
    {
        "manifest.json",
        "timeline.json",
        "timeline.planned.trace.json",
        "timeline.measured.trace.json",
        "reliability.json",
    }
)
"""Files that tell of the clock or of the faults, or hash those that do."""


@dataclass(frozen=True)
class Product:
    """A pretrain run: its words on the command line, and variables beside those of this process."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()  # a command that runs commands, e.g. `ip netns exec ...`

    @staticmethod
    def fresh(data: Sequence[str], folder: Path, *settings: str) -> "Product":
        """A run on a tokenized corpus (`tokenized`'s words) with results of its own below `folder`."""
        results = Path(data[-1].partition("=")[2])
        shutil.copytree(results, folder / "results", ignore=shutil.ignore_patterns("pretrain"), symlinks=True)
        return Product.of(data, folder, *settings)

    @staticmethod
    def of(data: Sequence[str], folder: Path, *settings: str) -> "Product":
        """The run that `fresh` made of the same words."""
        return Product((*data[:-1], *DUALPIPE, *settings, f"paths.results={folder}/results"))

    def but(self, *settings: str, **changes: Any) -> "Product":
        """The same with other settings."""
        return replace(self, words=(*self.words, *settings), **changes)

    def with_fault(self, fault: str, **details: Any) -> "Product":
        """The same with one more of the faults of `injected/sitecustomize.py` inside its processes."""
        path = os.pathsep.join([str(INJECTED), *filter(None, [os.environ.get("PYTHONPATH")])])
        faults = [*json.loads(self.environment.get("INJECTED_FAULT", "[]")), {"fault": fault, **details}]
        return self.but(environment={"PYTHONPATH": path, "INJECTED_FAULT": json.dumps(faults)})

    def taking_up(self, other: "Product", *at: int) -> "Product":
        """This run, which goes on from another's checkpoints of these steps: what came before need not run again."""
        for name in (f"step-{step:08d}" for step in at):
            shutil.copytree(other.checkpoints / name, self.checkpoints / name)
        return self

    @property
    def place(self) -> Place:
        """Where the run lies."""
        config = load(self.words)
        return places(config, known_lock(config).hash)["pretrain"]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.place.folder

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def start(self) -> "Stage":
        """One process of the stage."""
        return Stage(self)

    def run(self, seconds: float = 300) -> "Stage":
        """One process of the stage, to its end."""
        stage = self.start()
        stage.wait(seconds)
        return stage

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The run's ledger, or its entries of one kind."""
        path = self.folder / "ledger.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [entry for entry in entries if name in (None, entry["event"])]

    def differences(self, undisturbed: "Product") -> list[str]:
        """In what this finished run differs from another: its artifact, and every checkpoint that both have kept."""
        ours, theirs = self.folder, undisturbed.folder
        shared = sorted(steps(self.checkpoints) & steps(undisturbed.checkpoints))
        folders = [f"checkpoints/step-{step:08d}" for step in shared]
        last = max(steps(undisturbed.checkpoints))
        missing = [] if last in shared else [f"the checkpoint of the last step, {last}, is missing"]
        return missing + [line for name in ("artifact", *folders) for line in compared(ours / name, theirs / name)]


class Stage:
    """A started stage. `killed`, `ended` and the like are in seconds since 1970, as the run's journal has them."""

    def __init__(self, product: Product) -> None:
        self.product, self._folder = product, product.folder
        self._log = product.folder.parents[2] / "stderr.txt"
        self._journal = self._folder / "tracking" / "metrics.jsonl"
        self._seen, self._said_from = _size(self._journal), _size(self._log)
        command = [*product.prefix, sys.executable, "-m", "headrace.stages.pretrain", *product.words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **product.environment}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL, env=environment)

    @property
    def said(self) -> str:
        """What it wrote to the terminal."""
        with self._log.open("rb") as file:
            file.seek(self._said_from)
            return file.read().decode()

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.poll()

    def ranks(self) -> dict[int, psutil.Process]:
        """Its living ranks by their number."""
        found = {}
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return {}
        for process in children:
            try:
                if RANKS in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found[int(process.environ()["RANK"])] = process
            except psutil.Error:
                continue
        return found

    def listens(self) -> int:
        """On how many ports the stage's own process listens."""
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(connection.status == psutil.CONN_LISTEN for connection in connections)

    def both_ranks(self, seconds: float = 60) -> dict[int, psutil.Process]:
        """Its ranks, once all are there."""
        return wait_for(lambda: ranks if len(ranks := self.ranks()) == 2 else None, seconds, self)

    def wait(self, seconds: float = 300) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the stage did not end within {seconds} s; it said:\n{self.said[-4000:]}") from None

    def until_step(self, step: int, seconds: float = 120) -> int:
        """Wait until `step` steps were logged since the start of this process; the step it has got to."""

        def reached() -> int | None:
            newest = max((row["step"] for _, row in self.rows()), default=0)
            return newest if newest >= step else None

        return wait_for(reached, seconds, self)

    def until_trained(self, since: float, seconds: float = 120) -> float:
        """When the first step was logged after `since`."""

        def logged() -> float | None:
            return next((row["time"] for _, row in self.rows() if row["time"] > since and "loss" in row), None)

        return wait_for(logged, seconds, self)

    def until_saving(self, seconds: float = 60) -> Path:
        """Wait for a save to be under way; its unfinished folder."""
        folder = self._folder / "checkpoints"
        return wait_for(lambda: next(folder.glob(".unfinished-*"), None), seconds, self, poll=0.0005)

    def rows(self) -> list[tuple[int, dict[str, Any]]]:
        """What was logged since the start of this process."""
        return list(read_lines(self._journal, self._seen)) if self._journal.exists() else []

    def kill(self, victim: int | None) -> float:
        """SIGKILL to a rank, or to the stage's own process; when it was sent."""
        if victim is None:
            self.process.kill()
            now = time.time()
            self.process.wait()
            return now
        self.both_ranks()[victim].send_signal(signal.SIGKILL)
        return time.time()

    def end(self) -> None:
        """Kill everything that belongs to this run: for the end of a test that failed."""
        self.process.kill()
        self.process.wait()
        for process in running(str(self._folder)):
            process.kill()


def running(folder: str) -> list[psutil.Process]:
    """All living processes of ranks of the run in `folder`, whoever their parent is."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        ours = RANKS in words and any(word.startswith(folder) for word in words)
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for(ask: Callable[[], T | None], seconds: float, stage: Stage | None = None, poll: float = 0.02) -> T:
    """The first answer of `ask` that is not None. Fails, and ends the stage, where none comes or the stage ends."""
    until = time.monotonic() + seconds
    while True:
        ended = stage is not None and stage.code is not None  # read first: what it did before it ended counts
        if (found := ask()) is not None:
            return found
        if ended or time.monotonic() > until:
            said = ""
            if stage is not None:
                said = f" (exit code {stage.code}); the stage said:\n{stage.said[-4000:]}"
                stage.end()
            raise AssertionError(f"nothing came within {seconds} s{said}")
        time.sleep(poll)


def steps(checkpoints: Path) -> set[int]:
    """The steps that are listed as checkpoints."""
    return {int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")}


def spike(product: Product) -> tuple[int, str]:
    """The step of the run's only loss spike, and the policy that it met."""
    [found] = product.events("spike")
    assert float(found["loss"]) > 3 * found["mean"]
    return found["step"], found["policy"]


def compared(ours: Path, theirs: Path) -> list[str]:
    """In what two folders differ beside measured values, and manifests, which hash these."""
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in (ours, theirs)]
    if names[0] != names[1]:
        return [f"{ours}: holds {names[0]}, not {names[1]}"]
    differ = []
    for name in names[0]:
        if name not in NOT_OF_THE_MODEL and _content(ours / name) != _content(theirs / name):
            differ.append(f"{ours / name} differs")
    return differ


def _content(path: Path) -> Any:
    """What a file holds, without what is drawn anew for each save: the token that binds the files of one."""
    if path.suffix == ".jsonl":
        return [unmeasured(json.loads(line)) for line in path.read_text().splitlines()]
    content = path.read_bytes()
    if path.name == "slices.json":  # `files` are hashes of headers, which hold the token
        return {key: value for key, value in json.loads(content).items() if key not in ("token", "hash", "files")}
    if path.suffix == ".json":
        return unmeasured(json.loads(content))
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.get("__metadata__", {}).pop("token", None)
        return header, content[start:]
    return content


def unmeasured(value: Any) -> Any:
    """JSON without what a clock made."""
    if isinstance(value, dict):
        return {key: unmeasured(entry) for key, entry in value.items() if key not in MEASURED}
    return [unmeasured(entry) for entry in value] if isinstance(value, list) else value


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
