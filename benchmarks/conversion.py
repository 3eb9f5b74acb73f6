"""Conversion of weights, beside a plain copy of the same files and beside transformers: `make bench-convert`.

One model without MTP, in three forms that are made first: a checkpoint file in FP32, and Hub folders in BF16 and FP8.
Every way below runs in a process of its own, on one core, in turns, several times; all of them end with fsync of every
file, and begin with the source in the page cache. Imports are not timed.

    copy of ...      the source's weight files, byte by byte
    transformers     from_pretrained and save_pretrained of the BF16 folder
    BF16 -> BF16     ours, every tensor through the cast, as are the others
    ..., hashed      the same as the stage runs it: every finished shard is read back and its SHA-256 recorded
    check of ...     the second reading of source and result, bit by bit, that the stage makes afterwards

Bytes per second are those of the source's tensors. The ratio is the time of copying the same source over a way's time,
so it falls where a way writes more than it reads (FP8 -> BF16). Peak is the process' largest resident set (VmHWM), in
which pages of mapped files count; an empty process with the imports is given too.

    python benchmarks/conversion.py            2.6 GB in BF16; 14 GB of disk
    python benchmarks/conversion.py --quick    a hundredth of it, every way once
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from headrace.config.compose import load
from headrace.config.schema import ModelConfig
from headrace.conversion.check import verify_export
from headrace.conversion.convert_folder import convert_folder
from headrace.conversion.export import export
from headrace.conversion.hub_config import read_hub_config
from headrace.conversion.names import checkpoint_shapes
from headrace.conversion.shards import METADATA, Record
from headrace.conversion.streaming import PlannedTensor, TensorWriter

AIMS = {"BF16 -> BF16": 0.8, "BF16 -> FP8": 0.5}
SOURCES = {"fp32": "checkpoint.safetensors", "bf16": "bf16", "fp8": "fp8"}
WAYS = {  # name: source
    "nothing": None,
    "copy of FP32": "fp32",
    "FP32 checkpoint -> BF16": "fp32",
    "copy of BF16": "bf16",
    "transformers": "bf16",
    "BF16 -> BF16": "bf16",
    "BF16 -> BF16, hashed": "bf16",
    "BF16 -> FP8": "bf16",
    "check of BF16 -> FP8": "bf16",
    "copy of FP8": "fp8",
    "FP8 -> BF16": "fp8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, every way once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments.way, arguments.folder, limit(arguments.quick))))
        return
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        make_sources(folder, arguments.quick)
        sizes = {kind: size_of(folder / path) for kind, path in SOURCES.items()}
        rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(1 if arguments.quick else arguments.repeats):
            for way, found in rows.items():
                found.append(run(way, folder, arguments.quick))
    table = judged(rows, sizes)
    print_table(table, sizes)
    ratios = {way: table[way]["ratio"] for way in AIMS}
    summary = {"benchmark": "conversion", "quick": arguments.quick, "load_before": load_before, "bytes": sizes,
               "ways": table, "aims": AIMS, "met": {way: ratios[way] >= aim for way, aim in AIMS.items()}}  # fmt: skip
    print(json.dumps(summary))


def limit(quick: bool) -> int:
    """Bytes of a shard."""
    return 4_000_000 if quick else 1_000_000_000


def model(quick: bool) -> ModelConfig:
    """A mixture of experts whose matrices are multiples of 128; without MTP, which transformers would not save."""
    large = {"hidden_size": 2048, "intermediate_size": 8192, "moe_intermediate_size": 1408, "n_routed_experts": 64,
             "num_hidden_layers": 3, "q_lora_rank": 512, "kv_lora_rank": 384, "qk_nope_head_dim": 128,
             "qk_rope_head_dim": 128, "v_head_dim": 128, "num_attention_heads": 16}  # fmt: skip
    small = {**large, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "q_lora_rank": 128,
             "kv_lora_rank": 128, "num_attention_heads": 4}  # fmt: skip
    common = {"vocab_size": 1024 if quick else 32768, "n_shared_experts": 1, "num_nextn_predict_layers": 0}
    return replace(load(["model=nano"]).model, **{**(small if quick else large), **common})


def make_sources(folder: Path, quick: bool) -> None:
    """The checkpoint with random weights, tensor by tensor, and the two Hub folders."""
    config = model(quick)
    words = {"<begin>": 0, "<end>": 1}
    tokens = [{"content": word, "id": number} for word, number in words.items()]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": words}, "added_tokens": tokens})
    )
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<begin>", "eos_token": "<end>"})
    )
    generator = torch.Generator().manual_seed(0)
    shapes = checkpoint_shapes(config)
    plan = {name: PlannedTensor(torch.float32, shape) for name, shape in shapes.items()}
    with TensorWriter(folder / SOURCES["fp32"], plan, METADATA) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, generator=generator).mul_(0.02))
    for dtype in ("bf16", "fp8"):
        export(folder / SOURCES["fp32"], config, folder / "tokenizer", folder / dtype, dtype, limit(quick))


def run(way: str, folder: Path, quick: bool) -> dict[str, float]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder), *(["--quick"] if quick else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(way: str, folder: Path, shard: int) -> dict[str, float]:
    """Seconds of one way, and the largest resident set of this process."""
    out = folder / "out"
    act = prepared(way, folder, out, shard)
    if source := WAYS[way]:
        for path in files_of(folder / SOURCES[source]):
            warm(path)
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
    started = time.perf_counter()
    act()
    for path in files_of(out):
        sync(path)
    seconds = time.perf_counter() - started
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    shutil.rmtree(out, ignore_errors=True)
    (folder / "record.json").unlink(missing_ok=True)
    return {"seconds": seconds, "peak": int(peak[1]) * 1024}


def prepared(way: str, folder: Path, out: Path, shard: int) -> Callable[[], object]:
    """What is timed, with its imports made."""
    if way == "nothing":
        return lambda: None
    source = folder / SOURCES[WAYS[way]]
    if way.startswith("copy"):
        return lambda: copy(source, out)
    if way == "transformers":
        return through_transformers(source, out, shard)
    if way == "FP32 checkpoint -> BF16":
        config = read_hub_config(folder / "bf16")
        return lambda: export(source, config, folder / "tokenizer", out, "bf16", shard)
    if way.startswith("check"):
        config, _ = convert_folder(source, out, "fp8", shard)
        return lambda: verify_export(out, source, config)
    record = Record(folder / "record.json", {}) if way.endswith("hashed") else None
    return lambda: convert_folder(source, out, "fp8" if "-> FP8" in way else "bf16", shard, record=record)


def through_transformers(source: Path, out: Path, shard: int) -> Callable[[], object]:
    """Load and save, in BF16."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def act() -> None:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True)
        loaded.save_pretrained(out, max_shard_size=shard)

    return act


def copy(source: Path, out: Path) -> None:
    """The weight files, as they are, through memory: the system's own copy may share blocks of the disk instead."""
    out.mkdir()
    buffer = memoryview(bytearray(16 << 20))
    for path in files_of(source):
        with path.open("rb", buffering=0) as reader, (out / path.name).open("wb", buffering=0) as writer:
            while size := reader.readinto(buffer):
                writer.write(buffer[:size])


def warm(path: Path) -> None:
    """Read a file and forget it."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def sync(path: Path) -> None:
    """Force a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def files_of(path: Path) -> list[Path]:
    """The weight files of a source or result."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.exists() else []


def size_of(path: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in files_of(path))


def judged(rows: dict[str, list[dict[str, float]]], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Medians by way, with rate and ratio."""
    seconds = {way: statistics.median(row["seconds"] for row in found) for way, found in rows.items()}
    table = {}
    for way, source in WAYS.items():
        row = {"peak": max(found["peak"] for found in rows[way])}
        if source:
            of_copy = seconds[f"copy of {source.upper()}"]
            row |= {"seconds": seconds[way], "rate": sizes[source] / seconds[way], "ratio": of_copy / seconds[way]}
            row |= {"fastest": min(found["seconds"] for found in rows[way])}
        table[way] = {key: round(value, 4) for key, value in row.items()}
    return table


def print_table(table: dict[str, dict[str, float]], sizes: dict[str, int]) -> None:
    """For people."""
    print(", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in sizes.items()))
    print(f"{'way':<26}{'s':>8}{'MB/s':>8}{'of copy':>9}{'peak MB':>9}{'over nothing':>14}")
    nothing = table["nothing"]["peak"]
    for way, row in table.items():
        timed = f"{row['seconds']:>8.2f}{row['rate'] / 1e6:>8.0f}{row['ratio']:>9.0%}" if "rate" in row else " " * 25
        print(f"{way:<26}{timed}{row['peak'] / 1e6:>9.0f}{(row['peak'] - nothing) / 1e6:>14.0f}", flush=True)
    for way, aim in AIMS.items():
        print(f"aim for {way}: {aim:.0%} of the copy, measured {table[way]['ratio']:.0%}")


if __name__ == "__main__":
    main()
