"""What the data section of the report may say, as plain frozen dataclasses; see `facts` for the rules they follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Amount:
    """Documents and text under one name: a source, or a kind of text. Tokens are counted by source, never by kind."""

    name: str
    documents: int
    text_bytes: int
    tokens: int | None = None


@dataclass(frozen=True)
class Packing:
    """Rows of one length that a split's tokens were packed into."""

    row_length: int
    rows: int
    padding: float  # 0..1: share of the rows' elements that hold no token


@dataclass(frozen=True)
class Split:
    """One split of the corpus, as text and as tokens."""

    name: str
    documents: int
    text_bytes: int
    tokens: int  # end-of-sequence tokens included
    parts: tuple[Amount, ...]  # by source where several are named, else by kind; largest first
    lengths: tuple[int, ...]  # number k: documents of 2^k to 2^(k+1) - 1 tokens
    packed: tuple[Packing, ...]
    rearranged: int  # documents changed to fill in their middle
    split_tokens: int
    parity_checked: int  # documents encoded by the reference, too, and found equal


@dataclass(frozen=True)
class Drop:
    """A rule and the documents that it left out; by source where several are named."""

    rule: str
    documents: int
    by_source: Mapping[str, int]


@dataclass(frozen=True)
class Damage:
    """What could not be read in one source: documents by rule, and a few of them in words."""

    source: str
    rules: Mapping[str, int]
    examples: tuple[str, ...]


@dataclass(frozen=True)
class FoundItem:
    """An evaluation item that stands in the corpus: in how many documents, and the most of it that one of them has."""

    item: str
    documents: int
    share: float  # 0..1, of the item's n-grams


@dataclass(frozen=True)
class SoughtTask:
    """A task whose items were looked for."""

    name: str
    items: int
    unchecked: int  # too short, or without telling words


@dataclass(frozen=True)
class Contamination:
    """The search for evaluation items."""

    tasks: tuple[SoughtTask, ...]
    found: tuple[FoundItem, ...]  # the largest share first
    dropped: int  # training documents


@dataclass(frozen=True)
class Source:
    """Where text came from and under which licence."""

    name: str
    licence: str
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class Tokenizer:
    """What cut the text, and how documents were to be changed on the way."""

    vocabulary: int
    engine: str
    version: str
    unicode: str  # version of the engine's tables
    fim_rate: float  # 0..1, of training documents
    split_rate: float  # 0..1, of tokens that join punctuation and line ends


@dataclass(frozen=True)
class Piece:
    """A part of a decoded row: text, a control token, or a note in our own words (padding, what is not shown)."""

    kind: Literal["text", "control", "note"]
    text: str


@dataclass(frozen=True)
class ExampleRow:
    """One training row, decoded."""

    shard: str
    row: int  # within the shard
    length: int
    tokens: int
    held: int  # documents, or parts of documents, in the row
    documents: tuple[tuple[Piece, ...], ...]  # those that are shown


@dataclass(frozen=True)
class Data:
    """The data section: what was kept, what was left out, where it came from, and what the model reads."""

    splits: tuple[Split, ...]
    by: Literal["source", "kind"]  # what `Split.parts` are
    drops: tuple[Drop, ...]
    damaged: tuple[Damage, ...]
    quarantined: int  # damaged documents that the corpus keeps, as far as they fit
    contamination: Contamination | None  # None: not looked for
    sources: tuple[Source, ...]
    refused: Mapping[str, str]  # source -> why none of it was taken
    tokenizer: Tokenizer
    rows: tuple[ExampleRow, ...]
