"""A few training rows as text, so that everybody can see what the model reads and where documents begin and end.

Rows are chosen by rule and not by looks: the first row of each source, the first that holds several documents, and the
first with most of a document that was rearranged to fill in its middle. They are searched for in the first rows of a
shard, whose order is that of packing and thus shuffled.

A row is decoded piece by piece, from one control token to the next: so a control token is told apart from text that
merely spells one. A row may begin or end within a character; the bytes of it that are there show as U+FFFD.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.reporting.data_facts import ExampleRow, Piece
from headrace.reporting.quantities import exact
from headrace.tokens.loader import IGNORED, Split, TokenDataset

SEARCHED = 1 << 20
"""Tokens of a shard, at most, whose rows are looked at: a thousand web documents."""
_SOURCES, _DOCUMENTS = 3, 6  # of which rows, and in a row, are shown at most
_HEAD, _TAIL = 320, 120  # characters that are shown of a long piece
_SPLIT = "train"

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class _Row:
    shard: str
    number: int
    tokens: Ids  # without padding
    continues: bool  # begins within a document


def example_rows(tokenizer: Path, tokenize: Path) -> tuple[ExampleRow, ...]:
    """Decoded training rows of the folder of a tokenize artifact, by that of its tokenizer artifact."""
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    control = {id_: str(token) for id_, token in decoder.get_added_tokens_decoder().items()}
    dataset = TokenDataset(tokenize)
    length = int(dataset.description["row_lengths"][0])
    chosen = choose(_rows(dataset.split(_SPLIT), length), dataset.eos, control)
    return tuple(_decoded(row, length, dataset.eos, decoder, control) for row in chosen)


def choose(found: Iterable[list[_Row]], eos: int, control: Mapping[int, str]) -> list[_Row]:
    """Of the rows of each source: the first; and of all, the first that shows one thing and the other."""
    by_source = [rows for rows in found if rows]
    every = [row for rows in by_source for row in rows]
    others = list(set(control) - {eos})
    several = [row for row in every if eos in row.tokens[:-1]][:1]
    shown = [len(np.intersect1d(row.tokens, others)) for row in every]  # of prefix, suffix and middle
    rearranged = [every[shown.index(max(shown))]] if any(shown) else []
    wanted = [*(rows[0] for rows in by_source), *several, *rearranged]
    return list({(row.shard, row.number): row for row in wanted}.values())


def _rows(split: Split, length: int) -> Iterator[list[_Row]]:
    """The first rows of the first shard of each source."""
    ends = split.ends(length)
    for source in split.sources[:_SOURCES]:
        place = next(i for i, shard in enumerate(split.shards) if shard.source == source)
        rows, before = [], split.eos
        for number in range(min(-(-SEARCHED // length), int(ends[place + 1] - ends[place]))):
            elements = split.row(int(ends[place]) + number, length)
            tokens = elements[elements != IGNORED]
            rows.append(_Row(split.shards[place].name, number, tokens, before != split.eos))
            before = int(tokens[-1])
        yield rows


def _decoded(row: _Row, length: int, eos: int, decoder: Any, control: Mapping[int, str]) -> ExampleRow:
    bounds = np.flatnonzero(row.tokens == eos) + 1
    parts = [part for part in np.split(row.tokens, bounds) if len(part)]
    documents = [list(_pieces(part, decoder, control)) for part in parts[:_DOCUMENTS]]
    if row.continues:
        documents[0].insert(0, Piece("note", "begins in an earlier row"))
    if len(parts) > _DOCUMENTS:
        documents.append([Piece("note", f"{exact(len(parts) - _DOCUMENTS)} more")])
    elif row.tokens[-1] != eos:
        documents[-1].append(Piece("note", "goes on in the next row"))
    if padding := length - len(row.tokens):
        documents.append([Piece("note", f"padding: {exact(padding)}")])
    shown = tuple(map(tuple, documents))
    return ExampleRow(row.shard, row.number, length, len(row.tokens), len(parts), shown)


def _pieces(tokens: Ids, decoder: Any, control: Mapping[int, str]) -> Iterator[Piece]:
    """Text and control tokens in turn."""
    places = np.flatnonzero(np.isin(tokens, list(control)))
    for part in np.split(tokens, np.unique([*places, *(places + 1)]).astype(np.int64)):
        if len(part) == 1 and int(part[0]) in control:
            yield Piece("control", control[int(part[0])])
        elif len(part):
            yield from shortened(decoder.decode(part.tolist(), skip_special_tokens=False))


def shortened(text: str) -> Iterator[Piece]:
    """A long text without its middle."""
    left_out = len(text) - _HEAD - _TAIL
    if left_out <= _TAIL:
        yield Piece("text", text)
        return
    yield Piece("text", text[:_HEAD])
    yield Piece("note", f"{exact(left_out)} characters")
    yield Piece("text", text[-_TAIL:])
