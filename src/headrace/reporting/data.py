"""The data of the run: what the corpus and tokenize artifacts say, as facts, and a section of the report."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json
from headrace.corpus.quarantine import DOCUMENT_BYTES, QUARANTINE
from headrace.reporting.bars import Bar, BarChart, Histogram, bin_name, draw_bars, draw_histogram, filled_bins
from headrace.reporting.data_facts import (
    Amount,
    Contamination,
    Damage,
    Data,
    Drop,
    ExampleRow,
    FoundItem,
    Packing,
    SoughtTask,
    Source,
    Split,
    Tokenizer,
)
from headrace.reporting.decoded_rows import example_rows
from headrace.reporting.figures import Figure, twice
from headrace.reporting.quantities import exact

CORPUS, DATASET = "corpus.json", "dataset.json"
MOST_BARS, MOST_ITEMS = 16, 10
"""More parts of a split are drawn as one bar; more evaluation items are counted and not listed."""
_NAMES = {"train": "train", "validation": "validation", "heldout": "held-out"}
_DUPLICATES, _CONTAMINATED = ("exact duplicate", "near duplicate"), "contaminated"


def read_data(corpus: Path, tokenizer: Path, tokenize: Path) -> Data:
    """What the folders of the three artifacts say."""
    facts, dataset = read_json(corpus / CORPUS), read_json(tokenize / DATASET)
    return data_of(facts, dataset, example_rows(tokenizer, tokenize))


def data_of(facts: Mapping[str, Any], dataset: Mapping[str, Any], rows: tuple[ExampleRow, ...]) -> Data:
    """What corpus.json and dataset.json say."""
    named = any(shard["source"] for split in dataset["splits"].values() for shard in split["shards"])
    environment = facts["environment"] or {"packages": {}, "refused": {}, "python": ""}
    return Data(
        splits=tuple(
            _split(name, split, dataset["splits"][name], by_source=named)
            for name in _NAMES
            if (split := facts["splits"][name])["documents"]
        ),
        by="source" if named else "kind",
        drops=_drops(facts, by_source=named),
        damaged=tuple(
            Damage(source, rules, tuple(facts["damaged_examples"][source]))
            for source, rules in facts["damaged"].items()
        ),
        quarantined=facts["quarantined"],
        contamination=_contamination(facts),
        sources=_sources(facts["splits"], environment),
        refused=environment["refused"],
        tokenizer=Tokenizer(
            vocabulary=dataset["vocab_size"],
            **{key: dataset[key] for key in ("engine", "version", "unicode", "fim_rate", "split_rate")},
        ),
        rows=rows,
    )


def _split(name: str, text: Mapping[str, Any], tokens: Mapping[str, Any], *, by_source: bool) -> Split:
    by_name = Counter[str]()
    for shard in tokens["shards"]:
        by_name[shard["source"]] += shard["tokens"]
    table = text["mixture" if by_source else "kinds"]
    amounts = [Amount(part, row["documents"], row["bytes"], by_name.get(part)) for part, row in table.items()]
    return Split(
        name=_NAMES[name],
        documents=text["documents"],
        text_bytes=text["bytes"],
        tokens=tokens["tokens"],
        parts=tuple(sorted(amounts, key=lambda amount: (-amount.text_bytes, amount.name))),
        lengths=tuple(tokens["lengths"]),
        packed=tuple(
            Packing(length, rows, 1 - tokens["tokens"] / (length * rows))
            for length, rows in sorted((int(length), rows) for length, rows in tokens["rows"].items())
            if rows
        ),
        rearranged=tokens["counts"]["fim"],
        split_tokens=tokens["counts"]["split_tokens"],
        parity_checked=tokens["counts"]["parity_checked"],
    )


def _drops(facts: Mapping[str, Any], *, by_source: bool) -> tuple[Drop, ...]:
    """Most documents first."""
    tables = facts["dropped_by_source"].items() if by_source else ()
    drops = [
        Drop(rule, documents, {source: table[rule] for source, table in tables if rule in table})
        for rule, documents in facts["dropped"].items()
    ]
    return tuple(sorted(drops, key=lambda drop: (-drop.documents, drop.rule)))


def _contamination(facts: Mapping[str, Any]) -> Contamination | None:
    told = facts["contamination"]
    if told is None:
        return None
    found = [FoundItem(item, row["documents"], row["share"]) for item, row in told["found"].items()]
    found.sort(key=lambda each: (-each.share, -each.documents, each.item))
    tasks = tuple(SoughtTask(task, row["items"], row["unchecked"]) for task, row in told["tasks"].items())
    return Contamination(tasks, tuple(found), facts["dropped"].get(_CONTAMINATED, 0))


def contaminated(data: Data | None, weights_from: str | None) -> dict[str, str]:
    """By task, how many of its items were found in the text, before it was split; no entry: not looked for.

    Where training went on from other weights, the text behind those is not this run's, and was not searched for it.
    """
    if data is None or data.contamination is None:
        return {}
    counts = Counter(each.item.partition("/")[0] for each in data.contamination.found)
    unknown = f"not known: weights come from {weights_from}; in this run's text: " if weights_from else ""
    return {task.name: unknown + _found(counts[task.name], task) for task in data.contamination.tasks}


def _found(count: int, task: SoughtTask) -> str:
    found = f"{exact(count)}, their documents dropped" if count else "none"
    short = f"; {exact(task.unchecked)} of {exact(task.items)} items too short to be sought" if task.unchecked else ""
    return found + short


def _sources(splits: Mapping[str, Any], environment: Mapping[str, Any]) -> tuple[Source, ...]:
    """All splits together, largest first; the standard library is Python's and under Python's licence."""
    totals: dict[str, Counter[str]] = {}
    for split in splits.values():
        for name, row in split["sources"].items():
            totals.setdefault(name, Counter()).update(row)
    sources = [Source(*_origin(name, environment), row["documents"], row["bytes"]) for name, row in totals.items()]
    return tuple(sorted(sources, key=lambda source: (-source.text_bytes, source.name)))


def _origin(name: str, environment: Mapping[str, Any]) -> tuple[str, str]:
    """Name with version, and licence."""
    if name == "stdlib" and environment["python"]:
        return f"Python standard library {environment['python']}", "PSF-2.0"
    package = name.removeprefix("packages/")
    declared = environment["packages"].get(package)
    return (f"{package} {declared['version']}", declared["licence"]) if declared else (name, "not stated")


def section(data: Data, corpus: str, dataset: str) -> dict[str, Any]:
    """All that the template of the section needs; `corpus` and `dataset` are the files behind it."""
    kept = sum(split.documents for split in data.splits)
    dropped = sum(drop.documents for drop in data.drops)
    found = data.contamination.found if data.contamination else ()
    return {
        "found": data,
        "amounts": amounts_figure(data, dataset if data.by == "source" else corpus),
        "lengths": lengths_figure(data, dataset),
        "train": next((split for split in data.splits if split.name == _NAMES["train"]), None),
        "read": kept + dropped,
        "kept": kept,
        "duplicates": sum(drop.documents for drop in data.drops if drop.rule in _DUPLICATES),
        "parity": sum(split.parity_checked for split in data.splits),
        "listed": found[:MOST_ITEMS],
        "unlisted": max(0, len(found) - MOST_ITEMS),
        "quarantine_file": str(Path(corpus).with_name(QUARANTINE)),
        "quarantine_bytes": DOCUMENT_BYTES,
        "corpus_file": corpus,
        "dataset_file": dataset,
    }


def amounts_figure(data: Data, source: str) -> Figure | None:
    """Tokens by split and source; where no source is named, text by split and kind, since tokens have no kind."""
    tokens = data.by == "source"
    bars: list[Bar] = []
    for split in data.splits:
        parts = [(part.name, part.tokens if tokens else part.text_bytes) for part in split.parts]
        counted = [(name, value) for name, value in parts if value is not None]
        rest = counted[MOST_BARS:]
        bars.append(Bar(split.name, split.tokens if tokens else split.text_bytes, total=True))
        if len(counted) > 1:
            bars += [Bar(name, value) for name, value in counted[:MOST_BARS]]
        if rest:
            bars.append(Bar(f"{len(rest)} others", sum(value for _, value in rest)))
    if not bars:
        return None
    caption = (
        "Tokens of each split, those of training text by source."
        if tokens
        else "Text of each split by kind, in bytes; tokens are counted by split, and by source where several are named."
    )
    label = "Tokens by split and source" if tokens else "Text by split and kind"
    chart = BarChart(label, "tokens" if tokens else "bytes of text", tuple(bars))
    return twice(lambda width: draw_bars(chart, width), caption, source)


def lengths_figure(data: Data, source: str) -> Figure | None:
    """How long training documents are, beside the rows that they are packed into."""
    train = next((split for split in data.splits if split.name == _NAMES["train"]), None)
    if train is None or not any(train.lengths):
        return None
    marks = tuple((float(each.row_length), f"row of {exact(each.row_length)}") for each in train.packed)
    chart = Histogram("Lengths of training documents", "tokens of a document (K = 1,024)", "training documents",
                      train.lengths, marks)  # fmt: skip
    caption = (
        "Lengths of training documents, in powers of two. Documents that are longer than a row are cut; "
        "all others are whole in one row."
    )
    numbers = tuple((bin_name(k), exact(train.lengths[k])) for k in filled_bins(train.lengths))
    drawn = twice(lambda width: draw_histogram(chart, width), caption, source, ("tokens", "documents"), numbers)
    return replace(drawn, numbers_label="Training documents by their tokens")
