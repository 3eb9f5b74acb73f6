"""Which row each token gets at each of its experts.

The experts' GEMM wants its input sorted by expert, and each expert's rows filled up to a multiple of 128, so that a
tile of 128 rows belongs to one expert. Within an expert tokens keep their order, which makes the layout a function of
the choice alone: the same on every run, whatever the number of programs.

Three steps: blocks of tokens count their experts; one program turns the counts into each block's first row at each
expert; blocks place their tokens. Nothing is read back by the host: the tensors have room for the worst case unless the
caller knows the number of rows. Blocks of 128 rows past the end hold zeros and name the last expert, so that a GEMM
over all of them stays inside its operands.

Legend: N tokens, K experts per token, E experts of this process, S rows sorted by expert, B blocks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ROWS_MULTIPLE = 128
_TOKENS = 16  # tokens of one block: its table of 16 x 256 experts is 32 values in each of 128 threads


@dataclass(frozen=True)
class Layout:
    """Where N tokens lie in S rows. All tensors are int32."""

    rows_of_token: torch.Tensor  # [N, K], -1 where the expert is not one of this process
    token_of_row: torch.Tensor  # [S], -1 for rows that only fill up
    offsets: torch.Tensor  # [E + 1]: first row of each expert, multiples of 128; the last is the number of rows in use
    group_of_block: torch.Tensor  # [S / 128]: the expert of every 128 rows


def rows_needed(pairs: int, experts: int) -> int:
    """Rows that hold ``pairs`` (token, expert) pairs in the worst case, every expert filled up by 127."""
    return (pairs + min(pairs, experts) * (ROWS_MULTIPLE - 1)) // ROWS_MULTIPLE * ROWS_MULTIPLE


def blocks_at_once(experts_padded: int) -> int:
    """How many blocks' counts one step of ``starts_kernel`` reads: as many as registers hold."""
    return max(1, min(256, 4096 // experts_padded))


def lay_out(experts: torch.Tensor, count: int, first: int = 0, rows: int | None = None) -> Layout:
    """Sort those (token, expert) pairs of ``experts`` int32 [N, K] that name an expert first .. first + count - 1.

    The experts of a token are distinct; ids outside that range (-1 included) are other processes' and get no row.
    ``rows`` is S, a multiple of 128; by default enough for the worst case (if it is too small, pairs past the end have
    no row to lie in: the caller's mistake). Raises ValueError for other dtypes or shapes.
    """
    if experts.dim() != 2 or experts.dtype != torch.int32 or not experts.is_contiguous():
        raise ValueError(f"experts are {experts.dtype} {list(experts.shape)}; they have to be contiguous int32 [N, K]")
    N, K = experts.shape
    S = rows_needed(N * min(K, count), count) if rows is None else rows
    if count < 1 or S < 0 or S % ROWS_MULTIPLE:
        raise ValueError(f"{count} experts in {S} rows: at least one expert, and a multiple of {ROWS_MULTIPLE} rows")
    B = triton.cdiv(N, _TOKENS)
    counts, starts = experts.new_empty((2, B, count))
    layout = Layout(
        rows_of_token=torch.empty_like(experts),
        token_of_row=experts.new_full((S,), -1),
        offsets=experts.new_empty(count + 1),
        group_of_block=experts.new_empty(S // ROWS_MULTIPLE),
    )
    padded = triton.next_power_of_2(count)
    if B:
        count_kernel[(B,)](experts, counts, N, first, count, K=K, E_PADDED=padded, TOKENS=_TOKENS)
    starts_kernel[(1,)](
        counts, starts, layout.offsets, layout.group_of_block, B, S // ROWS_MULTIPLE, count,
        E_PADDED=padded, BLOCKS=blocks_at_once(padded), MULTIPLE=ROWS_MULTIPLE,
    )  # fmt: skip
    if B:
        place_kernel[(B,)](
            experts, starts, layout.rows_of_token, layout.token_of_row, N, S, first, count,
            K=K, E_PADDED=padded, TOKENS=_TOKENS,
        )  # fmt: skip
    return layout


def permute_weights(weights: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Routing weights [N, K] as the rows have them, [S], 0 for rows that only fill up. Differentiable."""
    S = len(layout.token_of_row)
    rows = layout.rows_of_token.flatten().long()
    elsewhere = weights.new_zeros(S + 1)  # the last entry takes the weights of other processes' experts
    return elsewhere.index_put((torch.where(rows < 0, S, rows),), weights.flatten())[:S]


@triton.jit
def chosen_by(experts_ptr, token, N, first, k, K: tl.constexpr, E_PADDED: tl.constexpr):
    """[tokens, E]: whether the k-th expert of each token is this process's expert e."""
    expert = tl.load(experts_ptr + token.to(tl.int64) * K + k, mask=token < N, other=first - 1) - first
    return expert[:, None] == tl.arange(0, E_PADDED)[None, :]


@triton.jit
def count_kernel(
    experts_ptr, counts_ptr, N, first, E, K: tl.constexpr, E_PADDED: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Tokens of one block at each expert, [B, E]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = tl.zeros((TOKENS, E_PADDED), tl.int32)
    for k in range(K):
        present += chosen_by(experts_ptr, token, N, first, k, K, E_PADDED).to(tl.int32)
    expert = tl.arange(0, E_PADDED)
    tl.store(counts_ptr + tl.program_id(0) * E + expert, tl.sum(present, axis=0), mask=expert < E)


@triton.jit
def starts_kernel(
    counts_ptr,
    starts_ptr,
    offsets_ptr,
    group_of_block_ptr,
    B,
    row_blocks,
    E,
    E_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    """First rows [B, E] from counts [B, E]; also the experts' first rows and the expert of every block of rows."""
    expert = tl.arange(0, E_PADDED)
    chunk = tl.arange(0, BLOCKS)
    totals = tl.zeros((E_PADDED,), tl.int32)
    for first in range(0, B, BLOCKS):
        place = (first + chunk)[:, None] * E + expert[None, :]
        real = (first + chunk < B)[:, None] & (expert < E)[None, :]
        totals += tl.sum(tl.load(counts_ptr + place, mask=real, other=0), axis=0)
    filled = (totals + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    ends = tl.cumsum(filled, axis=0)
    tl.store(offsets_ptr + expert, ends - filled, mask=expert < E)
    tl.store(offsets_ptr + 1 + expert, ends, mask=expert == E - 1)

    starts = ends - filled
    for first in range(0, B, BLOCKS):
        place = (first + chunk)[:, None] * E + expert[None, :]
        real = (first + chunk < B)[:, None] & (expert < E)[None, :]
        counts = tl.load(counts_ptr + place, mask=real, other=0)
        tl.store(starts_ptr + place, starts[None, :] + tl.cumsum(counts, axis=0) - counts, mask=real)
        starts += tl.sum(counts, axis=0)
    for first in range(0, row_blocks, BLOCKS):
        ended = (ends[None, :] <= ((first + chunk) * MULTIPLE)[:, None]) & (expert < E)[None, :]
        group = tl.minimum(tl.sum(ended.to(tl.int32), axis=1), E - 1)
        tl.store(group_of_block_ptr + first + chunk, group, mask=first + chunk < row_blocks)


@triton.jit
def place_kernel(
    experts_ptr,
    starts_ptr,
    rows_of_token_ptr,
    token_of_row_ptr,
    N,
    S,
    first,
    E,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Rows of one block's tokens: the block's first row at the expert, plus the block's earlier tokens there."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = tl.zeros((TOKENS, E_PADDED), tl.int32)
    for k in range(K):
        present += chosen_by(experts_ptr, token, N, first, k, K, E_PADDED).to(tl.int32)
    expert = tl.arange(0, E_PADDED)
    start = tl.load(starts_ptr + tl.program_id(0) * E + expert, mask=expert < E, other=0)
    rows = start[None, :] + tl.cumsum(present, axis=0) - present
    for k in range(K):
        hit = chosen_by(experts_ptr, token, N, first, k, K, E_PADDED) & (expert < E)[None, :]
        row = tl.sum(tl.where(hit, rows + 1, 0), axis=1) - 1
        tl.store(rows_of_token_ptr + token.to(tl.int64) * K + k, row, mask=token < N)
        tl.store(token_of_row_ptr + row, token, mask=(row >= 0) & (row < S) & (token < N))
