"""RoPE and the joining of heads for Multi-head Latent Attention, one pass over memory each way.

The projections give queries [B, T, H, N+R], keys and values together [B, T, H, N+V], and one rotated key part [B, T, R]
that all heads share (DeepSeek-V3 report, section 2.1.1). Attention wants queries and keys [B, H, T, N+R] and values
[B, H, T, V]: here the split, the rotation, the transposition and the sharing happen between one load and one store.
A pair of neighbours (x_2i, x_2i+1) is turned by an angle; the turned part is stored with all first members before all
second members, in queries and keys alike, so that their products do not change. Queries are multiplied by the softmax
scale on the way. Cosines, sines and products are FP32. The gradient turns back, and sums the shared part over the heads
in a fixed order.

Shapes: B batch, T tokens, H heads, N unrotated, R rotated, V value dimensions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 16
WARPS = 4


@triton.jit
def _load(pointer, rows, row_stride, width, inside, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(pointer + (rows[:, None] * row_stride + columns[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, rows, row_stride, width, inside, values, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < width)[None, :]
    tl.store(pointer + (rows[:, None] * row_stride + columns[None, :]), values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _pairs(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    return tl.split(tl.reshape(x, (ROWS, HALF, 2)))


@triton.jit
def forward_kernel(
    q,
    kv,
    k_rope,
    cos,
    sin,
    queries,
    keys,
    values,
    scale,
    T,
    H,
    N,
    R,
    V,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
    HALF: tl.constexpr,
    VALUE: tl.constexpr,
):
    """One program: BLOCK tokens of one head. Grid: (H, T / BLOCK, B). PLAIN, HALF and VALUE: see `padded`."""
    head, first, batch = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = rows < T - first
    token = batch * T + first
    half = R // 2
    cosines = _load(cos + first * half, rows, half, half, inside, HALF)
    sines = _load(sin + first * half, rows, half, half, inside, HALF)
    q += (token * H + head) * (N + R)
    kv += (token * H + head) * (N + V)
    at = (batch * H + head) * T + first
    queries += at * (N + R)
    keys += at * (N + R)
    plain = _load(q, rows, H * (N + R), N, inside, PLAIN)
    _store(queries, rows, N + R, N, inside, plain * scale, PLAIN)
    a, b = _pairs(_load(q + N, rows, H * (N + R), R, inside, 2 * HALF), BLOCK, HALF)
    scaled_cosines, scaled_sines = cosines * scale, sines * scale
    _store(queries + N, rows, N + R, half, inside, a * scaled_cosines - b * scaled_sines, HALF)
    _store(queries + N + half, rows, N + R, half, inside, b * scaled_cosines + a * scaled_sines, HALF)
    _store(keys, rows, N + R, N, inside, _load(kv, rows, H * (N + V), N, inside, PLAIN), PLAIN)
    a, b = _pairs(_load(k_rope + token * R, rows, R, R, inside, 2 * HALF), BLOCK, HALF)
    _store(keys + N, rows, N + R, half, inside, a * cosines - b * sines, HALF)
    _store(keys + N + half, rows, N + R, half, inside, b * cosines + a * sines, HALF)
    _store(values + at * V, rows, V, V, inside, _load(kv + N, rows, H * (N + V), V, inside, VALUE), VALUE)


@triton.jit
def backward_kernel(
    dqueries,
    dkeys,
    dvalues,
    cos,
    sin,
    dq,
    dkv,
    scale,
    T,
    H,
    N,
    R,
    V,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
    HALF: tl.constexpr,
    VALUE: tl.constexpr,
):
    """One program: BLOCK tokens of one head, all gradients but that of the shared key part. Grid: (H, T / BLOCK, B)."""
    head, first, batch = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = rows < T - first
    token = batch * T + first
    half = R // 2
    cosines = _load(cos + first * half, rows, half, half, inside, HALF) * scale
    sines = _load(sin + first * half, rows, half, half, inside, HALF) * scale
    dq += (token * H + head) * (N + R)
    dkv += (token * H + head) * (N + V)
    at = (batch * H + head) * T + first
    dqueries += at * (N + R)
    dkeys += at * (N + R)
    plain = _load(dqueries, rows, N + R, N, inside, PLAIN)
    _store(dq, rows, H * (N + R), N, inside, plain * scale, PLAIN)
    a = _load(dqueries + N, rows, N + R, half, inside, HALF)
    b = _load(dqueries + N + half, rows, N + R, half, inside, HALF)
    turned = tl.interleave(a * cosines + b * sines, b * cosines - a * sines)
    _store(dq + N, rows, H * (N + R), R, inside, turned, 2 * HALF)
    _store(dkv, rows, H * (N + V), N, inside, _load(dkeys, rows, N + R, N, inside, PLAIN), PLAIN)
    values = _load(dvalues + at * V, rows, V, V, inside, VALUE)
    _store(dkv + N, rows, H * (N + V), V, inside, values, VALUE)


@triton.jit
def shared_key_kernel(dkeys, cos, sin, dk_rope, T, H, N, R, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One program: the gradient of one token's shared key part, summed over the heads. Grid: (T, B)."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads, pairs = tl.arange(0, HEADS), tl.arange(0, HALF)
    half = R // 2
    inside = pairs < half
    head_stride = T * (N + R)
    at = dkeys + batch * H * head_stride + token * (N + R) + N
    a = tl.sum(_load(at, heads.to(tl.int64), head_stride, half, heads < H, HALF), 0)
    b = tl.sum(_load(at + half, heads.to(tl.int64), head_stride, half, heads < H, HALF), 0)
    cosines = tl.load(cos + token * half + pairs, mask=inside, other=0.0)
    sines = tl.load(sin + token * half + pairs, mask=inside, other=0.0)
    turned = tl.interleave(a * cosines + b * sines, b * cosines - a * sines).to(dk_rope.dtype.element_ty)
    columns = tl.arange(0, 2 * HALF)
    tl.store(dk_rope + (batch * T + token) * R + columns, turned, mask=columns < R)


def rope_concat(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (rotated, times `scale`) and keys (rotated), both [B, H, T, N+R], and values [B, H, T, V], contiguous.

    From q [B, T, H, N+R], kv [B, T, H, N+V] and the shared key part k_rope [B, T, R], all contiguous and of one dtype,
    BF16 or FP32; cos and sin FP32 [T, R/2]. Raises ValueError where shapes or dtypes do not fit.
    """
    B, T, H, width = q.shape
    R = k_rope.shape[-1]
    N, V = width - R, kv.shape[-1] - (width - R)
    _check(q, cos, sin, ("kv", kv, (B, T, H, N + V)), ("k_rope", k_rope, (B, T, R)))
    queries, values = q.new_empty(B, H, T, width), q.new_empty(B, H, T, V)
    keys = torch.empty_like(queries)
    if q.numel():
        with torch.cuda.device_of(q):
            forward_kernel[(H, triton.cdiv(T, BLOCK_TOKENS), B)](
                q, kv, k_rope, cos, sin, queries, keys, values, scale, T, H, N, R, V,
                BLOCK_TOKENS, *padded(N, R, V), num_warps=WARPS,
            )  # fmt: skip
    return queries, keys, values


def rope_concat_backward(
    dqueries: Tensor, dkeys: Tensor, dvalues: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B, T, H, N+R], kv [B, T, H, N+V] and k_rope [B, T, R] of `rope_concat`.

    From dqueries and dkeys [B, H, T, N+R] and dvalues [B, H, T, V], contiguous. Raises ValueError like `rope_concat`.
    """
    B, H, T, width = dqueries.shape
    R, V = 2 * cos.shape[-1], dvalues.shape[-1]
    N = width - R
    _check(dqueries, cos, sin, ("dkeys", dkeys, (B, H, T, width)), ("dvalues", dvalues, (B, H, T, V)))
    dq, dkv = dqueries.new_empty(B, T, H, width), dqueries.new_empty(B, T, H, N + V)
    dk_rope = dqueries.new_empty(B, T, R)
    if dqueries.numel():
        blocks = padded(N, R, V)
        with torch.cuda.device_of(dqueries):
            backward_kernel[(H, triton.cdiv(T, BLOCK_TOKENS), B)](
                dqueries, dkeys, dvalues, cos, sin, dq, dkv, scale, T, H, N, R, V,
                BLOCK_TOKENS, *blocks, num_warps=WARPS,
            )  # fmt: skip
            shared_key_kernel[(T, B)](
                dkeys, cos, sin, dk_rope, T, H, N, R, triton.next_power_of_2(H), blocks[1], num_warps=WARPS
            )
    return dq, dkv, dk_rope


def padded(N: int, R: int, V: int) -> tuple[int, int, int]:
    """N, R/2 and V rounded up to the powers of two that Triton's tiles have."""
    return triton.next_power_of_2(N), triton.next_power_of_2(R // 2), triton.next_power_of_2(V)


def _check(first: Tensor, cos: Tensor, sin: Tensor, *others: tuple[str, Tensor, tuple[int, ...]]) -> None:
    tokens = first.shape[1] if others[0][0] == "kv" else first.shape[2]
    half = cos.shape[-1]
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, half) or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(f"{name} is {table.dtype} {tuple(table.shape)}: give contiguous FP32 [{tokens}, R/2]")
    for name, tensor, shape in others:
        if tensor.shape != shape or tensor.dtype != first.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: give contiguous {first.dtype} {shape}")
