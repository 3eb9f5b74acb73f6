"""What a dataset of so many tokens takes: shards, bytes, jobs, and core-hours at the speed that is measured here.

The speed is that of the way from Parquet to a written and described shard, on this machine, with the tokenizer and a
sample of the text that will be tokenized; both are results of stages that ran before. What the stage does beside it is
not in it: reading the sources and comparing each text with its digest. Scans of the sources come before it and have a
row of their own.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from headrace.config.schema import Config
from headrace.config.shards import SHARD_TOKENS, training_shards
from headrace.planning.describe import scaled
from headrace.tokens.encode import Encoder, Settings
from headrace.tokens.shards import Encoded, write_shard

SAMPLE_BYTES = 16_000_000
PIECE_BYTES = 32_000_000
"""Of text that a scan takes at once (`corpus.pieces`)."""
_SCAN_SPEEDS = 45e6, 70e6  # bytes a core-second with 20,000 n-grams, as docs/data.md has them
_DOCUMENT_TOKENS = 1000  # of a web document, about
_INDEX_BYTES = 20  # of a document in `.idx`
_PACK_BYTES = 8  # of a row in `.pack`


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one core's time, and bytes of text per token, on `bytes` of text."""

    tokens_per_second: float
    bytes_per_token: float
    bytes: int
    tokenizer: str  # which one: its number of ids and its hash


def measure(corpus: Path, tokenizer: Path, config: Config) -> Speed:
    """Tokenize a sample of a corpus artifact with a tokenizer artifact, into a folder that is thrown away."""
    tokens = config.tokens
    encoder = Encoder(tokenizer, Settings(tokens.engine, tokens.parity_every, tokens.fim_rate, tokens.split_rate))
    sizes: list[int] = []
    with tempfile.TemporaryDirectory(prefix="headrace-plan-") as folder:
        began = time.process_time()
        shard = encoder.shard("sample", training=True)

        def encoded() -> Iterator[Encoded]:
            for batch in pq.ParquetFile(corpus / "sample.parquet").iter_batches(2048, columns=["id", "text"]):
                texts = batch["text"].to_pylist()
                ids, offsets = shard.encode(texts, batch["id"].to_pylist())
                sizes.append(sum(len(text.encode()) for text in texts))
                yield Encoded(ids, np.diff(offsets).astype(np.int32), sizes[-1])
                if sum(sizes) >= SAMPLE_BYTES:
                    return

        made = write_shard(Path(folder) / "sample", encoded(), tokens.row_lengths)
        seconds = time.process_time() - began
    known = encoder.identity()
    which = f"{known['vocab_size']:,} ids, {known['tokenizer']}"
    return Speed(made["tokens"] / seconds, sum(sizes) / made["tokens"], sum(sizes), which)


def dataset_rows(config: Config, total: int, speed: Speed | None) -> list[tuple[str, str]]:
    """Rows (label, value) for `headrace plan`; without a `speed` they say what must run first."""
    shards, launch = training_shards(config.tokens), config.launch
    indices = _INDEX_BYTES * total // _DOCUMENT_TOKENS
    indices += sum(_PACK_BYTES * total // length for length in config.tokens.row_lengths)
    shard_jobs = -(-(shards + 2) // launch.shards_per_job)
    each = scaled(min(SHARD_TOKENS, total / shards)).strip()
    found = [
        ("tokens", f"{total:,}"),
        ("token shards", f"{shards:,} of {each} tokens, and 2 of validation and held-out text"),
        ("token files", f"{scaled(4 * total)}B of ids, {scaled(indices)}B of indices (at 1,000 tokens a document)"),
    ]
    if speed is None:
        return [
            *found,
            ("jobs", f"{shard_jobs:,} of {launch.shards_per_job} shards, and those of the scans"),
            ("core-hours", "not known: run `snakemake tokenizer` once, and the speed is measured on its sample"),
        ]
    text = speed.bytes_per_token * total
    scan_jobs = -(-int(text) // (PIECE_BYTES * launch.pieces_per_job))
    scans = f"{scan_jobs:,} of {launch.pieces_per_job:,} pieces to scan"
    work = f"{scans}, {shard_jobs:,} of {launch.shards_per_job} shards"
    rate = f"{scaled(speed.tokens_per_second).strip()} tokens per core-second"
    measured = f"measured now on {speed.bytes / 1e6:.1f} MB of this corpus; scans not counted"
    slow, fast = (text / each / 3600 for each in _SCAN_SPEEDS)
    return [
        *found,
        ("tokenizer", speed.tokenizer),
        ("text", f"{scaled(text)}B at {speed.bytes_per_token:.2f} bytes a token"),
        ("jobs", f"{scan_jobs + shard_jobs + 4:,}: {work}, and 4 that plan and gather"),
        ("core-hours", f"{total / speed.tokens_per_second / 3600:,.0f} at {rate}, {measured}"),
        ("scan core-hours", f"{fast:,.0f} to {slow:,.0f} at 70 to 45 MB/s, not measured here: see docs/data.md"),
    ]
