"""What the dispatchers share: experts of a rank, and sums of a token's rows."""

import pytest
import torch

from headrace.errors import UserError
from headrace.parallel.experts import Sums, experts_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_accumulate_wider_than_bf16_and_skip_what_is_missing(dtype):
    rows = torch.full((6, 40), 2.0**-9, dtype=dtype)
    rows[0] = 1
    index = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, -1, -1, -1], [-1, 5, -1, -1, 0]])
    out = Sums.of(index)(rows)
    expected = torch.tensor([1 + 4 * 2.0**-9, 0, 1 + 2.0**-9], dtype=torch.float64).to(dtype)  # BF16 would stay at 1
    assert torch.equal(out, expected[:, None].expand(3, 40))
    assert out.dtype == dtype


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_expert_is_held_once_and_in_order(ranks):
    held = [experts_of(place, ranks, 8) for place in range(ranks)]
    assert [expert for experts in held for expert in experts] == list(range(8))
    assert {len(experts) for experts in held} == {8 // ranks}


def test_experts_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(UserError, match=r"parallel.expert=3 must divide model.n_routed_experts=8"):
        experts_of(0, 3, 8)
