"""From text to the ids that are stored: all that happens between a document and its place in a shard.

A training document may be rearranged to fill in its middle and may have combined tokens split (`fim`); its pieces are
encoded by the engine, which cannot produce a control id whatever the text says (`engine`); control ids are inserted
here, the end-of-sequence id after every document. What a document becomes depends on its text, its id and the
settings alone, never on the batch or shard that it is in.

An engine that is fast and wrong would be noticed by nobody: losses fall on wrong ids, too. So every n-th document of a
shard, its first one included, is encoded again by `tokenizers`, the reference, and any difference ends the shard. In a
small shard n is smaller: 32 documents of each are compared, or all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import hash_file
from headrace.errors import UserError
from headrace.tokens.engine import Engine, Flat, Ids, Name, open_engine, without_added_tokens
from headrace.tokens.fim import CombinedTokens, Fim
from headrace.tokens.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, control_ids, special_id, vocab_size

CHECKED_AT_LEAST = 32
"""Documents of a shard that are compared with the reference, where it has so many."""


@dataclass(frozen=True)
class Settings:
    """What ids depend on beside text and tokenizer. Rates are shares from 0 to 1, of documents and of tokens."""

    engine: Name = "auto"
    parity_every: int = 1000  # every n-th document is encoded again with `tokenizers`
    fim_rate: float = 0.0
    split_rate: float = 0.0  # of tokens that join punctuation and line ends
    seed: int = 0


class Encoder:
    """A tokenizer folder, loaded once for any number of shards and threads.

    Raises `UserError` when the engine is missing or cannot load the file, or when FIM is asked for and its control
    tokens are not there.
    """

    def __init__(self, tokenizer_folder: Path, settings: Settings) -> None:
        tokenizer_json = tokenizer_folder / "tokenizer.json"
        self.settings = settings
        self.eos = special_id(tokenizer_folder, "eos_token")
        self.vocab_size = vocab_size(tokenizer_folder)
        self.fim = _fim(tokenizer_folder, settings)
        self.engine = open_engine(settings.engine, tokenizer_json)
        # `tokenizers` itself would be compared with itself.
        self.reference = None if self.engine.name == "tokenizers" else open_engine("tokenizers", tokenizer_json)
        self.combined = _combined(tokenizer_json, self.engine, self.vocab_size) if settings.split_rate else None
        self._tokenizer_hash = hash_file(tokenizer_json, "sha256")

    def identity(self) -> dict[str, Any]:
        """What ids depend on, for the record of a shard: shards of different identities are no one dataset."""
        return {
            "tokenizer": self._tokenizer_hash,
            "eos": self.eos,
            "vocab_size": self.vocab_size,
            "fim_rate": self.settings.fim_rate,
            "split_rate": self.settings.split_rate,
            "seed": self.settings.seed,
            **self.engine.identity(),
        }

    def shard(self, name: str, *, training: bool, documents: int | None = None) -> "ShardEncoder":
        """The encoder of one shard, for one thread; documents are changed at random in training only.

        `documents`: how many it will have. Where that is not known, every `parity_every`-th is compared.
        """
        every = self.settings.parity_every
        if documents is not None:
            every = min(every, max(1, documents // CHECKED_AT_LEAST))
        return ShardEncoder(self, name, training, every)


@dataclass
class ShardEncoder:
    """Encodes the documents of the shard `name`, batch by batch, and counts: see `counts`."""

    encoder: Encoder
    name: str
    training: bool
    every: int  # n, of the documents that are compared
    counts: dict[str, int] = field(default_factory=lambda: {"parity_checked": 0, "fim": 0, "split_tokens": 0})
    _seen: int = 0

    def encode(self, texts: Sequence[str], document_ids: Sequence[int]) -> Flat:
        """(ids int32 [T], offsets int64 [documents + 1]): each document with its control ids, end of sequence included.

        Raises `UserError` naming shard and document if the engine's ids are not those of `tokenizers`.
        """
        assert len(texts) == len(document_ids), "every document has an id"
        numbers = np.array(document_ids, np.int64)
        pieces, leads, owners = self._pieces(texts, numbers)
        ids, offsets = self.encoder.engine.encode(pieces)
        self._check(pieces, owners, numbers, ids, offsets)
        combined, settings = self.encoder.combined, self.encoder.settings
        if combined and self.training:
            ids, offsets, split = combined.split(ids, offsets, numbers[owners], settings.split_rate, settings.seed)
            self.counts["split_tokens"] += split
        return _with_control_ids(ids, offsets, leads, owners, self.encoder.eos)

    def _pieces(self, texts: Sequence[str], numbers: NDArray[np.int64]) -> tuple[Sequence[str], Ids, Ids]:
        """What `Fim.pieces` returns; without FIM each document is one piece."""
        fim = self.encoder.fim
        if fim is None or not self.training:
            return texts, np.full(len(texts), -1, np.int32), np.arange(len(texts), dtype=np.int32)
        pieces, leads, owners = fim.pieces(texts, numbers, self.encoder.settings.seed)
        self.counts["fim"] += (len(pieces) - len(texts)) // 2
        return pieces, leads, owners

    def _check(
        self, pieces: Sequence[str], owners: Ids, numbers: NDArray[np.int64], ids: Ids, offsets: NDArray[np.int64]
    ) -> None:
        chosen = np.arange(-self._seen % self.every, len(numbers), self.every)
        self._seen += len(numbers)
        if self.encoder.reference is None or not len(chosen):
            return
        places = np.flatnonzero(np.isin(owners, chosen)).tolist()
        expected, bounds = self.encoder.reference.encode([pieces[place] for place in places])
        for which, place in enumerate(places):
            ours = ids[offsets[place] : offsets[place + 1]]
            if not np.array_equal(ours, expected[bounds[which] : bounds[which + 1]]):
                raise UserError(
                    f"shard {self.name}: document {numbers[owners[place]]} has other ids than `tokenizers` gives; "
                    "set tokens.engine=tokenizers"
                )
        self.counts["parity_checked"] += len(chosen)


def _with_control_ids(ids: Ids, offsets: NDArray[np.int64], leads: Ids, owners: Ids, eos: int) -> Flat:
    """Insert the control id before each piece (-1: none), and `eos` after the last piece of each document."""
    last = np.diff(owners, append=-1) != 0
    # Two places a piece, before and after it, in the order of storage.
    what = np.stack([leads, np.where(last, np.int32(eos), np.int32(-1))], axis=1).ravel()
    used = what >= 0
    places = np.stack([offsets[:-1], offsets[1:]], axis=1).ravel()[used]
    places += np.arange(len(places))
    out = np.empty(len(ids) + len(places), np.int32)
    text = np.ones(len(out), bool)
    text[places] = False
    out[text], out[places] = ids, what[used]
    ends = places[np.stack([np.zeros_like(last), last], axis=1).ravel()[used]] + 1
    return out, np.concatenate([np.zeros(1, np.int64), ends])


def _fim(folder: Path, settings: Settings) -> Fim | None:
    if not settings.fim_rate:
        return None
    begin, hole, end = control_ids(folder, (FIM_BEGIN, FIM_HOLE, FIM_END), f"tokens.fim_rate={settings.fim_rate}")
    return Fim(settings.fim_rate, begin, hole, end)


def _combined(tokenizer_json: Path, engine: Engine, size: int) -> CombinedTokens:
    from tokenizers import Tokenizer

    reference = Tokenizer.from_str(without_added_tokens(tokenizer_json))
    return CombinedTokens(reference.decode_batch([[id_] for id_ in range(size)]), engine.encode)
