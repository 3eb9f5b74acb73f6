"""All scans in, the selection out: what is dropped, and which split each other document is in.

In this order: exact duplicates (the first in reading order stays), near duplicates, the sample of `max_bytes`, splits,
evaluation items in training text. Only digests and counts are read, never text, and only one range of digests is in
memory at a time (`digest_ranges`), with the names of directories, a row a piece, and the documents that are not
training text. The fates lie in a file that is mapped: one byte a document of page cache.
The result is a function of the scans, whatever the ranges and whoever made the scans.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.config.schema import CorpusConfig
from headrace.corpus.digest_ranges import RANGE_DOCUMENTS, RECORD, DigestRanges, Records, first_of_each
from headrace.corpus.listing import ENVIRONMENT
from headrace.corpus.near_duplicates import near_duplicates
from headrace.corpus.scan_columns import Coded, Columns, read_columns, read_signatures
from headrace.corpus.selection import FATES, FIRST_RULE, PENDING
from headrace.corpus.split import HELDOUT, SPLITS, TRAIN, Group, Shares, Stratum, divide, joined, of_directories
from headrace.errors import UserError

HELD_KIND = "english"
"""Held out whatever the fractions say: the English book of the environment corpus."""

_TRAIN, _HELDOUT = SPLITS.index(TRAIN), SPLITS.index(HELDOUT)
_SLICE = 4096


class Codes:
    """Numbers for names, given in the order in which the names are met."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def of(self, name: str) -> int:
        """The number of a name."""
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]

    def translate(self, coded: Coded) -> NDArray[np.int64]:
        """Codes of one scan to codes of all; -1 stays -1."""
        table = np.array([*(self.of(name) for name in coded.names), -1], dtype=np.int64)
        return table[coded.codes]


class Selecting:
    """The selection as it comes about; `fates` [documents] and `sample` hold the result after `run`."""

    def __init__(
        self, config: CorpusConfig, scans: Sequence[Path], rows: int, out: Path, scratch: Path, range_documents: int
    ) -> None:
        self._config, self._scans = config, scans
        self.rules, self._groups, self._kinds = Codes(), Codes(), Codes()
        self._ranges = DigestRanges(scratch, rows, range_documents)
        path = out / FATES
        repeated = self._gather(path)
        self.fates = np.memmap(path, dtype=np.uint8, mode="r+") if rows else np.zeros(0, dtype=np.uint8)
        assert len(self.fates) == rows, "every scan was read whole"
        for ordinals in repeated:
            self._drop(ordinals, "exact duplicate")
        self.sample = np.zeros(0, dtype=np.uint64)

    def run(self) -> None:
        """Decide about every document; raises `UserError` when none is left or the text is too small to be split."""
        self._drop_duplicates()
        if self._config.near_duplicates:
            self._drop_near_duplicates(self._config.near_duplicates.threshold)
        if self._config.max_bytes is not None:
            self._drop_beyond(self._config.max_bytes)
        self._refuse_empty()
        self._split()
        self._drop_contaminated()
        self.sample = self._sample(self._config.sample_bytes)
        if isinstance(self.fates, np.memmap):
            self.fates.flush()

    def dropped(self) -> dict[str, int]:
        """Documents by the rule that dropped them."""
        counts = np.bincount(self.fates, minlength=FIRST_RULE + len(self.rules.names))[FIRST_RULE:]
        return {name: int(count) for name, count in sorted(zip(self.rules.names, counts, strict=False)) if count}

    def _gather(self, path: Path) -> list[NDArray[np.uint64]]:
        """Write the fates that the scans know, and the records of the other documents; returns repetitions."""
        repeated, ordinal = [], 0
        with path.open("wb") as file:
            for scan in self._scans:
                columns = read_columns(scan)
                rules = self.rules.translate(columns.rule)
                file.write(np.where(rules < 0, PENDING, FIRST_RULE + rules).astype(np.uint8).tobytes())
                repeated.append(self._ranges.add(self._records(columns, ordinal)[rules < 0]))
                ordinal += len(columns)
        repeated.append(self._ranges.flush())
        assert len(self.rules.names) < PENDING - FIRST_RULE - 4, "a rule is a byte"
        return [each for each in repeated if len(each)]

    def _records(self, columns: Columns, ordinal: int) -> Records:
        records = np.zeros(len(columns), dtype=RECORD)
        records["high"], records["low"] = columns.digests[:, 0], columns.digests[:, 1]
        records["ordinal"] = np.arange(ordinal, ordinal + len(columns), dtype=np.uint64)
        records["bytes"] = columns.bytes
        records["group"] = self._groups.translate(columns.group)
        records["kind"] = self._kinds.translate(columns.kind)
        records["contaminated"] = columns.contaminated
        return records

    def _drop(self, ordinals: NDArray[np.uint64], rule: str) -> None:
        self.fates[np.sort(ordinals)] = FIRST_RULE + self.rules.of(rule)

    def _drop_duplicates(self) -> None:
        for number, records in self._ranges:
            kept, again = first_of_each(records)
            self._drop(again, "exact duplicate")
            self._ranges.replace(number, kept)

    def _drop_near_duplicates(self, threshold: float) -> None:
        places: list[int] = []
        signatures: list[bytes] = []
        begin = 0
        for scan in self._scans:
            found = read_signatures(scan)
            for place in np.flatnonzero(self.fates[begin : begin + len(found)] == PENDING).tolist():
                signature = found[place]
                assert signature is not None, "a scan with near duplicates signs what it keeps"
                places.append(begin + place)
                signatures.append(signature)
            begin += len(found)
        chosen = near_duplicates(signatures, threshold) if signatures else []
        self._drop(np.array([places[index] for index in chosen], dtype=np.uint64), "near duplicate")
        self._keep_pending()

    def _keep_pending(self) -> None:
        for number, records in self._ranges:
            self._ranges.replace(number, records[self.fates[records["ordinal"]] == PENDING])

    def _drop_beyond(self, max_bytes: int) -> None:
        """Keep the documents of smallest digest that fit together: samples are nested."""
        total = 0
        for number, records in self._ranges:
            fits = total + np.cumsum(records["bytes"]) <= max_bytes
            self._drop(records["ordinal"][~fits], "not in the sample of max_bytes")
            self._ranges.replace(number, records[fits])
            total = max_bytes if not fits.all() else total + int(records["bytes"].sum())

    def _refuse_empty(self) -> None:
        if not any(len(records) for records in self._ranges.mapped()):
            reasons = ", ".join(f"{count} {rule}" for rule, count in self.dropped().items()) or "the sources hold none"
            raise UserError(f"corpus: no document is left ({reasons}); check corpus.paths and the limits in corpus.*")

    def _split(self) -> None:
        strata = self._strata()
        chosen = divide(strata, self._shares())
        directories = np.array([SPLITS.index(chosen.get(name, TRAIN)) for name in self._groups.names], dtype=np.uint8)
        documents = {name: split for name, split in chosen.items() if isinstance(name, bytes)}
        held = self._held_kind()
        for records in self._ranges.mapped():
            own = records["group"] < 0
            fates = np.where(own, _TRAIN, directories[records["group"]] if len(directories) else _TRAIN)
            fates[records["kind"] == held] = _HELDOUT
            self.fates[records["ordinal"]] = fates.astype(np.uint8)
        self._split_documents(documents)

    def _split_documents(self, chosen: dict[bytes, str]) -> None:
        """Set the fates of the documents that are groups of their own and not training text."""
        digests = sorted(chosen)
        halves = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)
        splits = np.array([SPLITS.index(chosen[digest]) for digest in digests], dtype=np.uint8)
        for records in self._ranges.mapped():
            places = np.searchsorted(halves[:, 0], records["high"])
            hit = np.flatnonzero(np.isin(records["high"], halves[:, 0]) & (records["group"] < 0))
            for index in hit.tolist():
                place = int(places[index])
                while place < len(halves) and halves[place, 0] == records["high"][index]:
                    if halves[place, 1] == records["low"][index]:
                        self.fates[int(records["ordinal"][index])] = splits[place]
                    place += 1

    def _shares(self) -> dict[str, Shares]:
        """Of each kind; a named source is a kind (`listing.kind_in`)."""
        shares = dict.fromkeys(self._kinds.names, Shares(*self._config.fractions_of(None)))
        shares |= {source.name: Shares(*self._config.fractions_of(source)) for source in self._config.sources}
        return shares

    def _held_kind(self) -> int:
        """The code of what is held out whatever the fractions say; one that no document has in a corpus of files."""
        return self._kinds.of(HELD_KIND) if self._config.source == ENVIRONMENT else int(np.iinfo(np.uint16).max)

    def _strata(self) -> dict[str, Stratum]:
        """By kind: directories, each with the kind that most of its text is of, and documents of their own."""
        held = self._held_kind()
        kinds, groups = len(self._kinds.names), len(self._groups.names)
        directories = np.zeros(groups * kinds, dtype=np.int64)
        counts, sizes = np.zeros(kinds, dtype=np.int64), np.zeros(kinds, dtype=np.int64)
        for records in self._ranges.mapped():
            records = records[records["kind"] != held]
            own = records["group"] < 0
            for kind in np.unique(records["kind"][own]).tolist():
                of_kind = own & (records["kind"] == kind)
                counts[kind] += np.count_nonzero(of_kind)
                sizes[kind] += int(records["bytes"][of_kind].sum())
            places = records["group"][~own].astype(np.int64) * kinds + records["kind"][~own]
            np.add.at(directories, places, records["bytes"][~own].astype(np.int64))
        by_kind = self._by_main_kind(directories.reshape(groups, kinds))
        strata = {}
        for code, kind in enumerate(self._kinds.names):
            documents = Stratum(int(counts[code]), int(sizes[code]), partial(self._documents, code))
            both = joined([of_directories(by_kind.get(kind, {})), documents])
            if both.count:
                strata[kind] = both
        return strata

    def _by_main_kind(self, bytes_by_kind: NDArray[np.int64]) -> dict[str, dict[str, int]]:
        """By kind: the bytes of each directory whose text is mostly of that kind (of equals, the first by name)."""
        found: dict[str, dict[str, int]] = {}
        by_name = np.argsort(np.array(self._kinds.names))
        main = by_name[np.argmax(bytes_by_kind[:, by_name], axis=1)]
        totals = bytes_by_kind.sum(axis=1)
        for number in np.flatnonzero(totals).tolist():
            kind = self._kinds.names[int(main[number])]
            found.setdefault(kind, {})[self._groups.names[number]] = int(totals[number])
        return found

    def _documents(self, kind: int) -> Iterator[Group]:
        """Documents of a kind that are groups of their own, by digest."""
        for records in self._ranges.mapped():
            for begin, end in pairwise([*range(0, len(records), _SLICE), len(records)]):
                part = records[begin:end]
                part = part[(part["kind"] == kind) & (part["group"] < 0)]
                digests = np.stack([part["high"], part["low"]], axis=1).astype(">u8").tobytes()
                for index, size in enumerate(part["bytes"].tolist()):
                    digest = digests[16 * index : 16 * index + 16]
                    yield Group(digest, size, digest)

    def _drop_contaminated(self) -> None:
        for records in self._ranges.mapped():
            ordinals = records["ordinal"][records["contaminated"]]
            self._drop(ordinals[self.fates[ordinals] == _TRAIN], "contaminated")

    def _sample(self, most: int) -> NDArray[np.uint64]:
        """Training documents of smallest digest that fit `most` bytes together, or the first one."""
        taken, total = [np.zeros(0, dtype=np.uint64)], 0
        for records in self._ranges.mapped():
            training = records[self.fates[records["ordinal"]] == _TRAIN]
            fits = total + np.cumsum(training["bytes"]) <= most
            if not total and len(training):
                fits[0] = True
            taken.append(training["ordinal"][fits])
            total += int(training["bytes"].sum())
            if total > most:
                break
        return np.sort(np.concatenate(taken))


def run_selecting(
    config: CorpusConfig,
    scans: Sequence[Path],
    rows: int,
    out: Path,
    range_documents: int = RANGE_DOCUMENTS,
) -> Selecting:
    """Decide about the documents of `scans`, which hold `rows`; working files lie in a folder of `out` meanwhile."""
    scratch = out / ".ranges"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        selecting = Selecting(config, scans, rows, out, scratch, range_documents)
        selecting.run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return selecting
