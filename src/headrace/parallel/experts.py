"""What the dispatchers share: which experts a rank holds, and sums over what experts made of a token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.errors import UserError


@dataclass(frozen=True)
class Sums:
    """Which rows are summed for each token: those of `rows` from `starts_N[n]` on to the next start."""

    rows: Tensor
    starts_N: Tensor

    @staticmethod
    def of(rows_of_token_NX: Tensor) -> "Sums":
        """-1 stands for no row."""
        used_NX = rows_of_token_NX >= 0
        counts_N = used_NX.sum(1)
        return Sums(rows_of_token_NX[used_NX], counts_N.cumsum(0) - counts_N)

    def __call__(self, values: Tensor) -> Tensor:
        """[rows, any] to [N, any], accumulated in FP32 also for BF16, in the order of `rows`; 0 where there is none."""
        return torch.nn.functional.embedding_bag(self.rows, values.contiguous(), self.starts_N, mode="sum")


def experts_of(place: int, ranks: int, experts: int) -> range:
    """The experts of the rank at `place` of an expert group. Raises `UserError` where they cannot share evenly."""
    if experts % ranks:
        raise UserError(f"parallel.expert={ranks} must divide model.n_routed_experts={experts}")
    share = experts // ranks
    return range(place * share, (place + 1) * share)
