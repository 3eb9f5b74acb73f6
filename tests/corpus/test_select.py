"""Selection: with ranges of a few documents and text split over any scans, what a plain program in memory gives."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config.compose import load
from headrace.config.schema import CorpusConfig
from headrace.corpus.scan import SCHEMA, Summary
from headrace.corpus.sealed import seal
from headrace.corpus.select import run_selecting
from headrace.corpus.selection import FIRST_RULE
from headrace.corpus.split import SPLITS
from headrace.errors import UserError

CONFIG = replace(
    load(["corpus=files", "corpus.paths=[x]", "corpus.contamination_tasks=[]"]).corpus,
    validation_fraction=0.1,
    heldout_fraction=0.2,
    source="environment",  # which holds its English book out
)


class Row(NamedTuple):
    """A document as a scan has it."""

    text: int  # stands for the text
    group: str | None
    kind: str
    rule: str | None
    contaminated: bool

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(str(self.text).encode()).digest()[:16]

    @property
    def size(self) -> int:
        return 1 + self.text % 977


ROWS = st.lists(
    st.builds(
        Row,
        st.integers(0, 120),
        st.sampled_from([None, None, "a", "b", "c/d", "e", "f", "g"]),
        st.sampled_from(["text", "text", "code", "docs", "english"]),
        st.sampled_from([None, None, None, None, "longer than max_document_bytes", "quality: x"]),
        st.sampled_from([False, False, False, True]),
    ),
    max_size=80,
)


def write_scans(rows: list[Row], cuts: list[int], folder: Path) -> list[Path]:
    """The rows as scans, cut at `cuts`; repetitions within a scan are marked, as a scan marks them."""
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    paths = []
    for number, (begin, end) in enumerate(zip([*bounds, 0][:-1], [*bounds[1:], len(rows)], strict=True)):
        table = [
            {
                "digest": row.digest,
                "bytes": row.size,
                "group": row.group,
                "kind": row.kind,
                "root": "root",
                "rule": row.rule,
                "contaminated": row.contaminated,
                "signature": None,
            }
            for row in rows[begin:end]
        ]
        path = folder / f"{number}.parquet"
        metadata = {"headrace": json.dumps(asdict(Summary("files", "")))}
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA.with_metadata(metadata)), buffer, row_group_size=7)
        path.write_bytes(seal(buffer.getvalue().to_pybytes()))
        paths.append(path)
    return paths


def in_memory(rows: list[Row], config: CorpusConfig) -> list[str]:
    """The fate of each row by the rules as they are written down, with lists and dictionaries."""
    fates = [row.rule or "" for row in rows]
    seen: set[bytes] = set()
    for place, row in enumerate(rows):
        if not fates[place]:
            fates[place] = "exact duplicate" if row.digest in seen else ""
            seen.add(row.digest)
    total = 0
    for place in sorted((p for p in range(len(rows)) if not fates[p]), key=lambda p: rows[p].digest):
        total += rows[place].size
        if config.max_bytes is not None and total > config.max_bytes:
            fates[place] = "not in the sample of max_bytes"
    splits = reference_splits([row for row, fate in zip(rows, fates, strict=True) if not fate], config)
    for place, row in enumerate(rows):
        if not fates[place]:
            fates[place] = "heldout" if row.kind == "english" else splits[group_of(row)]
            if fates[place] == "train" and row.contaminated:
                fates[place] = "contaminated"
    return fates


def group_of(row: Row) -> str | bytes:
    return row.group or row.digest


def reference_splits(rows: list[Row], config: CorpusConfig) -> dict[str | bytes, str]:
    sizes: Counter[str | bytes] = Counter()
    kinds: dict[str | bytes, Counter[str]] = {}
    for row in rows:
        if row.kind != "english":
            sizes[group_of(row)] += row.size
            kinds.setdefault(group_of(row), Counter())[row.kind] += row.size
    if len(sizes) <= 2:
        raise UserError("corpus: too small")
    strata: dict[str, list[str | bytes]] = {}
    for group, counts in kinds.items():
        strata.setdefault(min(counts, key=lambda kind: (-counts[kind], kind)), []).append(group)
    largest = min(strata, key=lambda kind: (-len(strata[kind]), kind))
    for kind in [kind for kind in strata if len(strata[kind]) <= 2 and kind != largest]:
        strata[largest] += strata.pop(kind)

    def order(group: str | bytes) -> bytes:
        return group if isinstance(group, bytes) else hashlib.sha256(group.encode()).digest()[:16]

    splits: dict[str | bytes, str] = {}
    for members in strata.values():
        free = sorted(members, key=order)
        total = sum(sizes[group] for group in members)
        splits |= dict.fromkeys(members, "train")
        for split, fraction, after in (
            ("heldout", config.heldout_fraction, 2),
            ("validation", config.validation_fraction, 1),
        ):
            target, filled, chosen, most = total * fraction, 0, [], len(free) - after
            for group in free:
                if filled < target and len(chosen) < most and filled + sizes[group] <= 1.25 * target:
                    chosen.append(group)
                    filled += sizes[group]
            chosen = chosen or [min(free, key=lambda group: (sizes[group], order(group)))]
            splits |= dict.fromkeys(chosen, split)
            free = [group for group in free if group not in chosen]
    return splits


def external(rows: list[Row], cuts: list[int], config: CorpusConfig, range_documents: int) -> tuple[list[str], Any]:
    with TemporaryDirectory() as folder:
        scans = write_scans(rows, cuts, Path(folder))
        out = Path(folder) / "out"
        out.mkdir()
        done = run_selecting(config, scans, len(rows), out, range_documents)
        names = [*SPLITS, *done.rules.names]
        assert len(SPLITS) == FIRST_RULE
        assert [path.name for path in out.iterdir()] == ["selection.fates"]  # the working files are gone
        return [names[fate] for fate in done.fates.tolist()], done.sample


@settings(max_examples=150, deadline=None)
@given(
    ROWS,
    st.lists(st.integers(0, 80), max_size=4),
    st.integers(1, 40),
    st.sampled_from([None, 1, 3000, 12_000]),
    st.integers(1, 9000),
)
def test_it_equals_the_plain_program(
    rows: list[Row], cuts: list[int], range_documents: int, max_bytes: int | None, sample_bytes: int
) -> None:
    config = replace(CONFIG, max_bytes=max_bytes, sample_bytes=sample_bytes)
    try:
        expected = in_memory(rows, config)
    except UserError:
        expected = None
    if expected is None:
        with pytest.raises(UserError, match=r"too small|no document is left"):
            external(rows, cuts, config, range_documents)
        return
    fates, sample = external(rows, cuts, config, range_documents)
    assert fates == expected
    training = sorted((place for place, fate in enumerate(expected) if fate == "train"), key=lambda p: rows[p].digest)
    totals = np.cumsum([rows[place].size for place in training])
    fitting = [place for place, total in zip(training, totals, strict=True) if total <= sample_bytes] or training[:1]
    assert sample.tolist() == sorted(fitting)


def test_a_text_repeated_everywhere_does_not_overfill_a_range(tmp_path: Path) -> None:
    rows = [Row(5, None, "text", None, False)] * 3000 + [Row(n, None, "text", None, False) for n in range(100)]
    fates, _ = external(rows, [1000, 2000], CONFIG, 16)
    assert fates.count("exact duplicate") == 3000  # all but the first of 5, which is in the second part too
    assert fates[0] != "exact duplicate" and fates[3005] == "exact duplicate"


def test_shares_of_many_documents_are_kept(tmp_path: Path) -> None:
    rows = [Row(n, None, "text", None, False) for n in range(20_000)]
    fates, _ = external(rows, [7000], CONFIG, 1000)
    sizes = {split: sum(row.size for row, fate in zip(rows, fates, strict=True) if fate == split) for split in SPLITS}
    total = sum(sizes.values())
    assert abs(sizes["heldout"] / total - 0.2) < 0.001 and abs(sizes["validation"] / total - 0.1) < 0.001
