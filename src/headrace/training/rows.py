"""The rows of tokens that a run reads: training rows by position, fixed rows for validation and for agreement.

The order of training rows is a pure function of (seed, position), so the whole state of reading is one integer. Rows
of validation are drawn by the same function with a seed of their own: spread over the split, whose documents are
sorted by source, and the same whatever `seed.data` is, so that runs with different seeds are measured on the same
text. A row holds the inputs and all targets: `sequence_length` tokens, one more for the next token, and one more for
each MTP depth.

A phase of context extension reads rows of its own length, in an order of its own. Its validation loss is measured on
rows of that length too, on about as many tokens.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from headrace.config.phases import MAIN, sequence_length_of
from headrace.config.schema import Config
from headrace.tokens.loader import Batches, TokenDataset

AGREEMENT_ROWS = 8
"""Held-out rows on which the trained, reloaded and converted model are compared."""
_MEASURING_SEED = 0


@dataclass(frozen=True)
class Rows:
    """All that a phase of a run reads. L is its sequence length, D the MTP depth, S `recipe.sequence_length`."""

    batch: Callable[[int, int], Tensor]  # (first position, sequences) -> int64 [sequences, L + 1 + D]
    training_rows: int  # rows of length S in one epoch
    validation: Tensor  # int64 [R, L + 1 + D]
    agreement: Tensor  # int64 [R, S + 1], from the held-out split


def open_rows(dataset: Path, config: Config, phase: str = MAIN) -> Rows:
    """Open the folder of a tokenize artifact for a phase; a split without a whole row is a `UserError`."""
    tokens, usual = TokenDataset(dataset), config.recipe.sequence_length
    length, extra = sequence_length_of(config.recipe, phase), 1 + config.model.num_nextn_predict_layers
    train = Batches(tokens.split("train"), _order(config.seed.data, length, usual), length, extra)
    validation = Batches(tokens.split("validation"), _MEASURING_SEED, length, extra)
    heldout = Batches(tokens.split("heldout"), _MEASURING_SEED, usual, 1)
    rows = max(1, config.train.validation_rows * usual // length)
    return Rows(
        batch=train.batch,
        training_rows=tokens.split("train").rows(usual),
        validation=validation.batch(0, min(rows, validation.rows)),
        agreement=heldout.batch(0, min(AGREEMENT_ROWS, heldout.rows)),
    )


def _order(seed: int, length: int, usual: int) -> int:
    """The seed of the order of rows: `seed` itself for rows of the `usual` length."""
    if length == usual:
        return seed
    return int.from_bytes(hashlib.blake2b(f"rows of {length}, {seed}".encode(), digest_size=8).digest(), "little")
