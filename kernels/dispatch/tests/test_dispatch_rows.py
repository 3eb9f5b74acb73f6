"""Moving rows: bit for bit against indexing, quantised bytes against ml_dtypes, gradients against autograd."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from headrace_dispatch import combine, lay_out, permute, permute_quantise, permute_quantised, reference


def choices(tokens, experts, chosen, device, seed=0):
    """Distinct random experts per token, int32 [tokens, chosen]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).topk(chosen, dim=1).indices.int().to(device)


def hidden(tokens, columns, device, seed=0, dtype=torch.bfloat16):
    """Values of very different sizes, from token to token and from tile to tile."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-20, 20, (tokens, -(-columns // 128)), generator=generator).float())
    values = torch.randn(tokens, columns, generator=generator) * sizes.repeat_interleave(128, dim=1)[:, :columns]
    return values.to(dtype).to(device)


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("columns", [128, 1100], ids=["one tile", "ragged"])
def test_permute(dtype, columns, device):
    layout = lay_out(choices(45, 6, 3, device), 4, first=1)
    x = hidden(45, columns, device).to(dtype)
    rows = permute(x, layout)
    for row, token in enumerate(layout.token_of_row.tolist()):
        assert torch.equal(bits(rows[row]), bits(x[token]) if token >= 0 else torch.zeros_like(bits(x[0])))


def test_combine_adds_in_the_order_of_the_experts(device):
    # 2^24 + 1 + 1 is 2^24 in FP32 from the left and 2^24 + 2 from the right.
    experts = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.int32, device=device)
    layout = lay_out(experts, 3)
    rows = torch.zeros(len(layout.token_of_row), 4, device=device)
    values = [2.0**24, 1.0, 1.0]
    for token in range(2):
        for k, row in enumerate(layout.rows_of_token[token].tolist()):
            rows[row] = values[experts[token, k]]
    assert combine(rows, layout).tolist() == [[2.0**24] * 4, [2.0**24 + 2] * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_combine(dtype, device):
    layout = lay_out(choices(45, 6, 3, device), 4, first=1)
    rows = hidden(len(layout.token_of_row), 1100, device).to(dtype)
    result = combine(rows, layout)
    assert torch.equal(result, reference.combine(rows, layout))
    assert result.dtype == dtype
    local = (layout.rows_of_token >= 0).sum(dim=1)
    assert (result[local == 0] == 0).all()
    exact = torch.stack(
        [rows.double()[[row for row in token if row >= 0]].sum(dim=0) for token in layout.rows_of_token.tolist()]
    )
    largest = rows.double().abs().max()
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * largest * 3
    out = torch.full_like(result, 7.0)
    assert combine(rows, layout, out) is out
    assert torch.equal(out, result)


def test_each_is_the_others_gradient(device):
    experts = choices(20, 6, 3, device)
    layout = lay_out(experts, 6)
    x = torch.randn(20, 130, device=device, requires_grad=True)
    weights = torch.rand(len(layout.token_of_row), 1, device=device)
    upstream = torch.randn(20, 130, device=device)
    combine(permute(x, layout) * weights, layout).backward(upstream)
    totals = weights[layout.rows_of_token.long(), 0].sum(dim=1)
    torch.testing.assert_close(x.grad, upstream * totals[:, None])


def one_tile(values):
    """Scale and codes of 128 numbers by exact arithmetic in Python and the rounding of ml_dtypes."""
    if not all(math.isfinite(value) for value in values):
        return math.nan, [0x7F] * len(values)
    amax = max(*map(abs, values), 448 * 2.0**-126)
    quotient = float(np.float32(amax) / np.float32(448))
    scale = 2.0 ** math.ceil(math.log2(quotient))
    scaled = np.clip(np.array(values, dtype=np.float64) / scale, -448, 448).astype(np.float32)
    return scale, scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tolist()


@pytest.mark.parametrize("quantise", [permute_quantise, reference.permute_quantise], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantised_bytes(quantise, dtype, device):
    layout = lay_out(choices(21, 5, 2, device), 5)
    x = hidden(21, 1152, device, dtype=dtype)
    x[0, :128] = 0  # an all-zero tile
    x[1, 5] = float("nan")
    x[2, 130] = float("inf")
    x[3, 256:384] = 448.0 * 2.0**-3  # the largest value is exactly a power of two times 448
    x[4, :128] = 1e-40  # far below the smallest scale
    x[5, 7], x[5, 8] = 3.3e38, -3.3e38
    codes, scales = quantise(x, layout)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.shape == (len(layout.token_of_row), 1152)
    assert scales.shape == (len(layout.token_of_row), 9)
    expected = {token: [one_tile(tile) for tile in x[token].double().view(9, 128).tolist()] for token in range(21)}
    expected[-1] = [(2.0**-126, [0] * 128)] * 9
    codes, scales = codes.view(torch.uint8).tolist(), scales.tolist()
    for row, token in enumerate(layout.token_of_row.tolist()):
        for tile, (scale, tile_codes) in enumerate(expected[token]):
            assert scales[row][tile] == scale or (math.isnan(scale) and math.isnan(scales[row][tile]))
            assert codes[row][tile * 128 : tile * 128 + 128] == tile_codes


def test_scales_are_stored_along_the_rows(device):
    layout = lay_out(choices(5, 4, 2, device), 4)
    _, scales = permute_quantise(hidden(5, 256, device), layout)
    assert scales.stride() == (1, len(layout.token_of_row))


def test_quantising_before_or_on_the_way_is_the_same(device):
    experts = choices(30, 6, 3, device)
    layout = lay_out(experts, 6)
    x = hidden(30, 384, device)
    identity = lay_out(torch.zeros(30, 1, dtype=torch.int32, device=device), 1)
    codes, scales = (tensor[:30].contiguous() for tensor in permute_quantise(x, identity))
    moved = permute_quantised(codes, scales, layout)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(moved, permute_quantise(x, layout), strict=True))
    assert moved[1].stride() == (1, len(layout.token_of_row))


def test_refuses_in_one_line(device):
    layout = lay_out(choices(5, 4, 2, device), 4)
    for call, message in [
        (lambda: permute(torch.zeros(4, 8, device=device), layout), "5 rows"),
        (lambda: permute(torch.zeros(8, 5, device=device).t(), layout), "contiguous"),
        (lambda: combine(torch.zeros(5, 8, device=device), layout), "contiguous with"),
        (lambda: permute_quantise(torch.zeros(5, 100, device=device), layout), "multiple of 128"),
        (lambda: permute_quantised(torch.zeros(5, 128), torch.zeros(5, 2), layout), "one per 1x128"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
