"""What the kernels of layout.py and rows.py compute, in plain PyTorch, for any device: to be read, not to be fast.

Legend: N tokens, K experts per token, E experts of this process, S rows sorted by expert, D columns.
"""

from __future__ import annotations

import torch

from .layout import ROWS_MULTIPLE, Layout, rows_needed


def lay_out(experts: torch.Tensor, count: int, first: int = 0, rows: int | None = None) -> Layout:
    """As ``headrace_dispatch.lay_out``."""
    N, K = experts.shape
    S = rows_needed(N * min(K, count), count) if rows is None else rows
    local = (experts.long() - first).flatten()
    local = torch.where((local < 0) | (local >= count), count, local)  # a class of its own, sorted last
    counts = torch.bincount(local, minlength=count + 1)[:count]
    ends = ((counts + ROWS_MULTIPLE - 1) // ROWS_MULTIPLE * ROWS_MULTIPLE).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    order = local.argsort(stable=True)
    order = order[local[order] < count]
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[local[order]]
    row = offsets[local[order]] + place
    rows_of_token = torch.full_like(local, -1).index_put((order,), row).view(N, K)
    token_of_row = row.new_full((S,), -1).index_put((row,), order // K)
    first_row = torch.arange(0, S, ROWS_MULTIPLE, device=ends.device)
    group_of_block = torch.searchsorted(ends, first_row, right=True).clamp(max=count - 1)
    return Layout(rows_of_token.int(), token_of_row.int(), offsets.int(), group_of_block.int())


def permute(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows [S, D] of ``x`` [N, D]; zeros where rows only fill up."""
    filling = layout.token_of_row < 0
    return x[layout.token_of_row.clamp(min=0).long()].masked_fill(filling[:, None], 0)


def permute_quantise(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes E4M3 [S, D] and power-of-two scales FP32 [S, D / 128] of the rows."""
    tiles = permute(x, layout).float().unflatten(1, (-1, 128))
    broken = ~tiles.isfinite().all(dim=2)
    amax = tiles.abs().amax(dim=2).clamp(min=448 * 2.0**-126).masked_fill(broken, 448.0)
    mantissa, exponent = torch.frexp(amax / torch.full_like(amax, 448.0))
    scales = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
    codes = (tiles / scales[..., None]).masked_fill(broken[..., None], float("nan")).clamp(-448, 448)
    return codes.flatten(1).to(torch.float8_e4m3fn), scales.masked_fill(broken, float("nan"))


def combine(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum of each token's rows, [N, D], in FP32 in the order of its experts."""
    total = torch.zeros((len(layout.rows_of_token), rows.shape[1]), dtype=torch.float32, device=rows.device)
    for row in layout.rows_of_token.long().unbind(1):
        total += rows[row.clamp(min=0)].float().masked_fill((row < 0)[:, None], 0)
    return total.to(rows.dtype)
