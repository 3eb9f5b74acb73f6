"""Rows of tokens as the model reads them, and the documents that a row is packed of.

A row holds T + 1 + D elements: element p is read, p + 1 is its target, and with multi-token prediction (D = 1) element
p + 1 is read beside p, and p + 2 is the target. By default the documents of a row see each other, as in DeepSeek-V3
(arXiv 2412.19437, section 4.1). Given the id that ends documents, each is trained as if it had a row to itself:

- attention begins where the document begins, and so do positions (`rope.rotation`)
- as at the end of a row (`tokens.loader`), targets past a document's end are absent, and what multi-token prediction
  reads there is the document's last token once more

Where documents begin follows from the tokens, which all stages of a pipeline have; they are the boundaries that
`tokens.loader.Batches.cu_seqlens` gives. Padding is a piece of its own.
Shapes: B rows, L elements of a row, T tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

from headrace.model.loss import IGNORED, inputs_of


def document_starts(rows_BL: Tensor, eos: int) -> Tensor:
    """int64 [B, L]: the element at which each element's document begins; `eos` is the last of its document."""
    after = torch.arange(1, rows_BL.shape[1], device=rows_BL.device)
    begun = torch.where(rows_BL[:, :-1] == eos, after, 0)
    return functional.pad(begun, (1, 0)).cummax(dim=1).values


class Shifted:
    """Rows int64 [B, L] of which T tokens are read; `eos` ends documents that do not see each other, None: all do."""

    def __init__(self, rows_BL: Tensor, tokens: int, eos: int | None) -> None:
        self._rows, self._tokens = rows_BL, tokens
        self._starts = None if eos is None else document_starts(rows_BL, eos)

    @property
    def starts(self) -> Tensor | None:
        """int64 [B, T]: where each token's document begins; None where a row is one."""
        return None if self._starts is None else self._starts[:, : self._tokens]

    def inputs(self, ahead: int = 0) -> Tensor:
        """int64 [B, T]: what is read beside each token, `ahead` of it."""
        whole = inputs_of(self._rows)
        inputs = whole[:, ahead : self._tokens + ahead]
        return inputs if self._starts is None else torch.where(self._past(ahead), whole[:, : self._tokens], inputs)

    def targets(self, ahead: int) -> Tensor:
        """int64 [B, T]: tokens `ahead` of each; `IGNORED` where there is none."""
        targets = self._rows[:, ahead : self._tokens + ahead]
        return targets if self._starts is None else targets.masked_fill(self._past(ahead), IGNORED)

    def _past(self, ahead: int) -> Tensor:
        assert self._starts is not None
        return self._starts[:, ahead : self._tokens + ahead] != self._starts[:, : self._tokens]
