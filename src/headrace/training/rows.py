"""The rows of tokens that a run reads: training rows by position, fixed rows for validation and for agreement.

The order of training rows is a pure function of (seed, position), so the whole state of reading is one integer. Rows
of validation are drawn by the same function with a seed of their own: spread over the split, whose documents are
sorted by source, and the same whatever `seed.data` is, so that runs with different seeds are measured on the same
text. A row holds the inputs and all targets: `sequence_length` tokens, one more for the next token, and one more for
each MTP depth. Where there is no token it has `tokens.loader.IGNORED`, of which the model makes no target.

A phase of context extension reads rows of its own length, in an order of its own. Its validation loss is measured on
rows of that length too, on about as many tokens.

While a step is computed, a thread reads the rows that the next step will ask for: a shard that is read for the first
time has to be verified first.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from headrace.config.phases import MAIN, sequence_length_of
from headrace.config.schema import Config
from headrace.model.loss import inputs_of
from headrace.recipe.mixture import segments
from headrace.tokens.loader import Batches, TokenDataset

AGREEMENT_ROWS = 8
"""Held-out rows on which the trained, reloaded and converted model are compared."""
_MEASURING_SEED = 0


@dataclass(frozen=True)
class Rows:
    """All that a phase of a run reads. L is its sequence length, D the MTP depth, S `recipe.sequence_length`.

    Elements that are no token are `tokens.loader.IGNORED`; rows of agreement have none, they end on in their last one.
    """

    batch: Callable[[int, int], Tensor]  # (first position, sequences) -> int64 [sequences, L + 1 + D]
    training_rows: int  # rows of length S in one epoch
    validation: Tensor  # int64 [R, L + 1 + D]
    agreement: Tensor  # int64 [R, S + 1], from the held-out split
    eos: int | None = None  # train.mask_documents: the id that ends documents; None: a row's documents see each other


def open_rows(dataset: Path, config: Config, phase: str = MAIN) -> Rows:
    """Open the folder of a tokenize artifact for a phase; a split without a whole row is a `UserError`."""
    tokens, usual = TokenDataset(dataset), config.recipe.sequence_length
    length, extra = sequence_length_of(config.recipe, phase), 1 + config.model.num_nextn_predict_layers
    train = training_batches(tokens, config, length, extra)
    validation = Batches(tokens.split("validation"), _MEASURING_SEED, length, extra)
    heldout = Batches(tokens.split("heldout"), _MEASURING_SEED, usual, 1)
    rows = max(1, config.train.validation_rows * usual // length)
    return Rows(
        batch=ReadAhead(train.batch),
        training_rows=tokens.split("train").rows(usual),
        validation=validation.batch(0, min(rows, validation.rows)),
        agreement=inputs_of(heldout.batch(0, min(AGREEMENT_ROWS, heldout.rows))),
        eos=tokens.eos if config.train.mask_documents else None,
    )


def training_batches(tokens: TokenDataset, config: Config, length: int, extra: int) -> Batches:
    """The rows of `length` tokens that a run trains on, in its order and mixture; `extra` targets past their ends."""
    split, usual = tokens.split("train"), config.recipe.sequence_length
    mixture = segments(config.recipe, split.sources, length)
    return Batches(split, _order(config.seed.data, length, usual), length, extra, mixture)


class ReadAhead:
    """`batch`, and while its caller is busy a thread that calls it for what the next call will probably ask.

    Steps have a stride: the next call asks for as many rows, as far behind this call's as these lay behind the last
    call's. A guess that was wrong costs reading and changes nothing, since `batch` is a pure function.
    """

    def __init__(self, batch: Callable[[int, int], Tensor]) -> None:
        self._batch, self._thread = batch, ThreadPoolExecutor(1, "rows")
        self._guess: tuple[int, int] | None = None
        self._ahead: Future[Tensor]
        self._last: int | None = None

    def __call__(self, first_position: int, sequences: int) -> Tensor:
        """int64 [sequences, L + 1 + D]: what `batch` gives, or raises."""
        asked = first_position, sequences
        rows = self._ahead.result() if asked == self._guess else self._batch(*asked)
        stride = sequences if self._last is None else first_position - self._last
        self._last, self._guess = first_position, None
        if stride > 0:
            self._guess = first_position + stride, sequences
            self._ahead = self._thread.submit(self._batch, *self._guess)
        return rows


def _order(seed: int, length: int, usual: int) -> int:
    """The seed of the order of rows: `seed` itself for rows of the `usual` length."""
    if length == usual:
        return seed
    return int.from_bytes(hashlib.blake2b(f"rows of {length}, {seed}".encode(), digest_size=8).digest(), "little")
