"""The rows of tokens that a run reads: training rows by position, fixed rows for validation and for agreement.

The order of training rows is a pure function of (seed, position), so the whole state of reading is one integer. Rows
of validation are drawn by the same function with a seed of their own: spread over the split, whose documents are
sorted by source, and the same whatever `seed.data` is, so that runs with different seeds are measured on the same
text. A row holds the inputs and all targets: `sequence_length` tokens, one more for the next token, and one more for
each MTP depth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from headrace.config.schema import Config
from headrace.tokens.loader import Batches, TokenDataset

AGREEMENT_ROWS = 8
"""Held-out rows on which the trained, reloaded and converted model are compared."""
_MEASURING_SEED = 0


@dataclass(frozen=True)
class Rows:
    """All that a run reads. L is `recipe.sequence_length`, D the MTP depth."""

    batch: Callable[[int, int], Tensor]  # (first position, sequences) -> int64 [sequences, L + 1 + D]
    training_rows: int  # rows of one epoch
    validation: Tensor  # int64 [R, L + 1 + D]
    agreement: Tensor  # int64 [R, L + 1], from the held-out split


def open_rows(dataset: Path, config: Config) -> Rows:
    """Open the folder of a tokenize artifact for `config`; a split without a whole row is a `UserError`."""
    tokens = TokenDataset(dataset)
    length, extra = config.recipe.sequence_length, 1 + config.model.num_nextn_predict_layers
    train = Batches(tokens.split("train"), config.seed.data, length, extra)
    validation = Batches(tokens.split("validation"), _MEASURING_SEED, length, extra)
    heldout = Batches(tokens.split("heldout"), _MEASURING_SEED, length, 1)
    return Rows(
        batch=train.batch,
        training_rows=train.rows,
        validation=validation.batch(0, min(config.train.validation_rows, validation.rows)),
        agreement=heldout.batch(0, min(AGREEMENT_ROWS, heldout.rows)),
    )
