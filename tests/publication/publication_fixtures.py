"""Facts, small model folders and interrupted pushes for the publication tests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from headrace.artifacts.files import write_json
from headrace.errors import UserError
from headrace.publication.facts import CardFacts, DataSource, Measurement
from headrace.tokens.indexed import IndexedWriter
from loopback_hub import CUT, LOST, LoopbackHub

FINGERPRINT = "0123456789ab"
SHARDS = {f"train-{number:05d}-of-00005": 30 + number for number in range(5)} | {"heldout-00000-of-00001": 7}
FAULTS = [401, 403, 412, 429, 500, CUT, LOST]  # each at every request of a push


def card_facts(**changes: object) -> CardFacts:
    facts = CardFacts(
        title="Small model",
        license="other",
        repo_id="me/small",
        fingerprint=FINGERPRINT,
        config={"hidden_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1},
        parameters=7_700_000,
        parameters_activated=3_000_000,
        parameters_mtp=500_000,
        tokens=6_000_000,
        sequence_lengths=[256],
        flops=1.25e14,
        seconds=246.0,
        hardware="2 CPU cores",
        precision="bf16",
        dtype="bf16",
        weight_bytes=15_400_000,
        cuts_blocks=False,
        optimizer="Muon",
        sources=[DataSource("numpy", "BSD-3-Clause", 410, 5_123_456), DataSource("CPython", "PSF-2.0", 900, 9_000_000)],
        measurements=[
            Measurement("Bits per byte", "held-out", None, "bits_per_byte", 1.91, 1.8, 2.02, 321, {"bigram": 2.3}),
            Measurement("Canonical", "HumanEval", "openai/openai_humaneval", "nats", 0.7, None, None, 164, {"xz": 0.9}),
        ],
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        code_version="0.1.0",
        command="snakemake publish --config experiment=demo",
    )
    return replace(facts, **changes)


def model_folder(folder: Path, shards: int = 2, value: float = 1.0) -> Path:
    """What a convert stage leaves, in small: real safetensors, the JSON files, and the artifact's own manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:06d}.safetensors"
        weights = {f"layer.{number}.weight": np.full((64, 64), value * number, dtype=np.float32)}
        save_file(weights, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, name)
    index = {"metadata": {"total_size": shards * 64 * 64 * 4}, "weight_map": weight_map}
    documents = {
        "model.safetensors.index.json": index,
        "config.json": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 64},
        "generation_config.json": {"eos_token_id": 1},
        "tokenizer.json": {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}},
        "tokenizer_config.json": {"eos_token": "<｜end▁of▁sentence｜>"},
        "manifest.json": {"hash": "sha256:" + "ab" * 32},
    }
    for name, value_ in documents.items():
        (folder / name).write_text(json.dumps(value_, ensure_ascii=False), encoding="utf-8")
    return folder


def token_shards(folder: Path) -> None:
    """What a tokenize stage leaves, in small, without the artifact's manifest."""
    splits = {}
    for name, count in SHARDS.items():
        rows = [[*range(2, 2 + number % 9), 1] for number in range(count)]
        with IndexedWriter(folder / name) as writer:
            ids = np.array([id_ for row in rows for id_ in row], np.int32)
            writer.add(ids, np.array([len(row) for row in rows], np.int32))
        shard = {"name": name, "tokens": len(ids), "documents": count}
        splits.setdefault(name.split("-")[0], {"shards": []})["shards"].append(shard)
    write_json(
        folder / "tokenizer.json", {"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 2}, "merges": []}}
    )
    write_json(folder / "dataset.json", {"eos": 1, "tokenizer": "sha256:0123", "splits": splits})


def local_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def emptied(hub: LoopbackHub) -> None:
    """The Hub as it began."""
    hub.repositories.clear()
    hub.objects.clear()
    hub.buckets.clear()


def failing(hub: LoopbackHub, publish: Callable[[], object], fault: int | str, at: int) -> Exception | None:
    """What the push raised whose request `at` met the fault; only what a user can act upon may be raised."""
    hub.requests.clear()
    hub.fail("*", "", fault, at=at)
    try:
        publish()
    except (UserError, ConnectionError) as error:
        assert len(str(error).splitlines()) == 1
        if fault == 403:
            assert isinstance(error, UserError), hub.requests[at - 1]
        return error
    finally:
        hub.unfail()
        if fault == 403 and len(hub.requests) >= at:
            assert hub.requests[at - 1] not in hub.requests[at:], "asked again"
    return None
