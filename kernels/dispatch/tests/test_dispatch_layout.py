"""The layout of rows against a loop in Python."""

import pytest
import torch

from headrace_dispatch import lay_out, permute_weights, reference, rows_needed


def choices(tokens, experts, chosen, device, seed=0):
    """Distinct random experts per token, crowded towards the low ids, int32 [tokens, chosen]."""
    generator = torch.Generator().manual_seed(seed)
    crowd = torch.rand(tokens, experts, generator=generator) * torch.linspace(1, 0.2, experts)
    return crowd.topk(chosen, dim=1).indices.int().to(device)


def loop(experts, count, first, rows):
    """Row by row: tokens in order, experts one after the other, blocks of 128."""
    rows_of_token = [[-1] * len(chosen) for chosen in experts]
    token_of_row, offsets, groups = [], [0], []
    for expert in range(first, first + count):
        for token, chosen in enumerate(experts):
            if expert in chosen:
                rows_of_token[token][chosen.index(expert)] = len(token_of_row)
                token_of_row.append(token)
        while len(token_of_row) % 128:
            token_of_row.append(-1)
        groups += [expert - first] * (len(token_of_row) // 128 - len(groups))
        offsets.append(len(token_of_row))
    token_of_row += [-1] * (rows - len(token_of_row))
    groups += [count - 1] * (rows // 128 - len(groups))
    return rows_of_token, token_of_row, offsets, groups


CASES = {
    "all experts here": (70, 16, 4, 16, 0),
    "a share of the experts": (70, 16, 4, 4, 8),
    "three experts, many tokens": (300, 3, 2, 3, 0),
    "one token": (1, 12, 3, 12, 0),
    "more experts than tokens": (5, 40, 2, 40, 0),
    "nothing for this process": (20, 4, 2, 4, 100),
    "many blocks for one program": (2100, 130, 1, 130, 0),
}


@pytest.mark.parametrize("build", [lay_out, reference.lay_out], ids=["kernel", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layout(build, case, device):
    tokens, total, chosen, count, first = case
    experts = choices(tokens, total, chosen, device)
    layout = build(experts, count, first)
    expected = loop(experts.tolist(), count, first, len(layout.token_of_row))
    assert layout.rows_of_token.tolist() == expected[0]
    assert layout.token_of_row.tolist() == expected[1]
    assert layout.offsets.tolist() == expected[2]
    assert layout.group_of_block.tolist() == expected[3]
    assert {tensor.dtype for tensor in vars(layout).values()} == {torch.int32}


def test_absent_experts_get_no_row(device):
    experts = torch.tensor([[2, -1], [-1, -1], [0, 2]], dtype=torch.int32, device=device)
    layout = lay_out(experts, 3)
    assert layout.rows_of_token.tolist() == [[128, -1], [-1, -1], [0, 129]]
    assert layout.offsets.tolist() == [0, 128, 128, 256]


def test_no_tokens(device):
    layout = lay_out(torch.empty(0, 4, dtype=torch.int32, device=device), 8)
    assert layout.token_of_row.shape == (0,)
    assert layout.offsets.tolist() == [0] * 9


def test_known_number_of_rows(device):
    experts = choices(50, 4, 2, device)
    assert len(lay_out(experts, 4, rows=512).token_of_row) == 512


@pytest.mark.parametrize("pairs", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("experts", [1, 3, 300])
def test_rows_needed_is_the_worst_case(pairs, experts):
    # The worst distribution gives as many experts as possible one token more than a multiple of 128.
    counts = [1] * min(pairs, experts)
    counts[0] += pairs - len(counts)
    spare = [0]
    for fill in range(counts[0] // 128 + 1):  # moving whole blocks between experts changes nothing; leftovers may
        spare.append(-(-(counts[0] - fill) // 128) * 128 + (len(counts) - 1) * 128)
    assert max(spare) <= rows_needed(pairs, experts)
    assert rows_needed(pairs, experts) - max(spare) < 128
    assert rows_needed(pairs, experts) % 128 == 0


def test_weights_travel_and_come_back(device):
    experts = choices(40, 8, 3, device)
    layout = lay_out(experts, 4, first=4)
    weights = torch.rand(40, 3, device=device, requires_grad=True)
    moved = permute_weights(weights, layout)
    upstream = torch.rand(len(moved), device=device)
    moved.backward(upstream)
    for token, rows in enumerate(layout.rows_of_token.tolist()):
        for k, row in enumerate(rows):
            assert row < 0 or moved[row] == weights[token, k]
            assert weights.grad[token, k] == (0 if row < 0 else upstream[row])
    assert (moved[layout.token_of_row < 0] == 0).all()


@pytest.mark.parametrize(
    ("experts", "count", "rows", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), 2, None, "contiguous int32"),
        (torch.zeros(4, dtype=torch.int32), 2, None, "contiguous int32"),
        (torch.zeros(4, 2, dtype=torch.int32), 0, None, "at least one expert"),
        (torch.zeros(4, 2, dtype=torch.int32), 2, 100, "multiple of 128 rows"),
    ],
)
def test_refuses_in_one_line(experts, count, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        lay_out(experts, count, rows=rows)
    assert "\n" not in str(error.value)
