"""Router of DeepSeek-V3 in one pass over the logits (report, arXiv 2412.19437, section 2.1.2, eq. 12-16).

    s = sigmoid(logits)
    z = s + bias                         the bias takes part in the selection only and gets no gradient
    groups:  the `groups_chosen` groups of consecutive experts with the largest sum of their two best z
    experts: the `chosen` best z within those groups; all others count as -inf, since a bias may make z negative
    weights: s of the chosen, divided by their sum (+ 1e-20) if `normalise`, times `factor`

PyTorch needs a dozen launches and as many tensors of [N, E] for this; here a token's scores never leave the registers.

Everything is deterministic. Equal z: the expert (or group) of the lower index wins, which torch.topk leaves open. To
get that exactly, floats are compared as integers that sort alike, and the winner is the smallest index that holds the
largest key. NaN sorts above all, as in torch: a router that has diverged chooses the NaN and hands on a NaN weight,
instead of hiding it. The counts are sums of integers, so the order of their atomic additions does not show.

It does not multiply by the router's matrix, update the bias or compute the balance loss.

Legend: N tokens, E experts, K experts per token, G groups, P experts of one group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

ROWS_MULTIPLE = 128  # an expert's rows are filled up to this: a tile of the FP8 GEMM then belongs to one expert
_TOKENS = 4  # tokens of one program: one for each of its warps, 8 of 256 scores in each thread

_NEVER = tl.constexpr(-(2**31))  # key below that of every float, -inf included
_NOT_A_NUMBER = tl.constexpr(2**31 - 1)  # key above that of +inf


class Routed(NamedTuple):
    """A routing decision for N tokens."""

    experts: torch.Tensor  # int32 [N, K], best first
    weights: torch.Tensor  # FP32 [N, K], differentiable
    counts: torch.Tensor  # int32 [E]: tokens of each expert
    offsets: torch.Tensor  # int32 [E + 1]: first row of each expert when rows are filled up to multiples of 128


def route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    groups_chosen: int,
    chosen: int,
    normalise: bool = True,
    factor: float = 1.0,
) -> Routed:
    """Choose ``chosen`` experts for each row of FP32 ``logits`` [N, E] under the selection ``bias`` FP32 [E].

    Raises ValueError where shapes, dtypes or the numbers of groups and experts cannot be.
    """
    check(logits, bias, groups, groups_chosen, chosen)
    return Routed(*_Route.apply(logits, bias, groups, groups_chosen, chosen, normalise, factor))


def route_backward(
    dweights: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor, normalise: bool, factor: float
) -> torch.Tensor:
    """Gradient FP32 [N, E] of ``logits``, given that of the weights, FP32 [N, K]. The choice itself has none."""
    dlogits = torch.zeros_like(logits)
    N, K = experts.shape
    if N:
        backward_kernel[(triton.cdiv(N, _TOKENS),)](
            dweights.contiguous(), logits, experts, dlogits, N, logits.shape[1], factor,
            K=K, K_PADDED=triton.next_power_of_2(K), NORMALISE=normalise, TOKENS=_TOKENS,
        )  # fmt: skip
    return dlogits


def check(logits: torch.Tensor, bias: torch.Tensor, groups: int, groups_chosen: int, chosen: int) -> None:
    """Refuse, in one line, what cannot be routed."""
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; they have to be contiguous float32 [N, E]")
    E = logits.shape[1]
    if bias.shape != (E,) or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; it has to be contiguous float32 [{E}]")
    if groups < 1 or E % groups or not 1 <= groups_chosen <= groups:
        raise ValueError(f"{groups_chosen} of {groups} groups of {E} experts: groups have to divide the experts")
    if groups_chosen < groups and E // groups < 2:
        raise ValueError(f"{groups} groups of {E} experts: a group is judged by its two best, so it needs two experts")
    if not 1 <= chosen <= groups_chosen * (E // groups):
        raise ValueError(f"chosen is {chosen}; {groups_chosen} groups hold {groups_chosen * (E // groups)} experts")


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, bias: torch.Tensor, groups: int, groups_chosen: int, chosen: int,
        normalise: bool, factor: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        N, E = logits.shape
        experts = logits.new_empty((N, chosen), dtype=torch.int32)
        weights = logits.new_empty((N, chosen))
        counts = logits.new_zeros(E, dtype=torch.int32)
        offsets = counts.new_empty(E + 1)
        if N:
            route_kernel[(triton.cdiv(N, _TOKENS),)](
                logits, bias, experts, weights, counts, N, factor,
                G=groups, G_PADDED=triton.next_power_of_2(groups), G_CHOSEN=groups_chosen,
                P=E // groups, P_PADDED=triton.next_power_of_2(E // groups),
                K=chosen, K_PADDED=triton.next_power_of_2(chosen), NORMALISE=normalise, TOKENS=_TOKENS,
            )  # fmt: skip
        offsets_kernel[(1,)](counts, offsets, E, E_PADDED=triton.next_power_of_2(E), MULTIPLE=ROWS_MULTIPLE)
        ctx.save_for_backward(logits, experts)
        ctx.rule = (normalise, factor)
        ctx.mark_non_differentiable(experts, counts, offsets)
        return experts, weights, counts, offsets

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        return route_backward(gradients[1], logits, experts, *ctx.rule), None, None, None, None, None, None


@triton.jit
def sortable(values):
    """int32 keys that compare as FP32 `values` do, with every NaN above +inf."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(values != values, _NOT_A_NUMBER, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def first_largest(keys, lanes, axis: tl.constexpr):
    """Along `axis`: the smallest lane number at which the largest key stands. Keeps the axis, with length 1."""
    largest = tl.max(keys, axis=axis, keep_dims=True)
    return tl.min(tl.where(keys == largest, lanes, 2147483647), axis=axis, keep_dims=True)


@triton.jit
def without_other_groups(keys, values, G_PADDED: tl.constexpr, G_CHOSEN: tl.constexpr, P_PADDED: tl.constexpr):
    """`keys` [tokens, G, P] with _NEVER in all but the G_CHOSEN groups whose two best `values` have the largest sum."""
    lane = tl.arange(0, P_PADDED)[None, None, :]
    best = first_largest(keys, lane, 2)
    second = first_largest(tl.where(lane == best, _NEVER, keys), lane, 2)
    sums = tl.sum(tl.where((lane == best) | (lane == second), values, 0.0), axis=2, keep_dims=True)
    group = tl.arange(0, G_PADDED)[None, :, None]
    present = tl.max(keys, axis=2, keep_dims=True) > _NEVER
    group_keys = tl.where(present, sortable(sums), _NEVER)
    for _ in tl.static_range(G_CHOSEN):
        group_keys = tl.where(group == first_largest(group_keys, group, 1), _NEVER, group_keys)
    return tl.where(present & (group_keys == _NEVER), keys, _NEVER)


@triton.jit
def route_kernel(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    counts_ptr,
    N,
    factor,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    G_CHOSEN: tl.constexpr,
    P: tl.constexpr,
    P_PADDED: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One block of tokens; experts lie as [G, P], padded to powers of two, so that lanes keep the experts' order."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group = tl.arange(0, G_PADDED)[None, :, None]
    member = tl.arange(0, P_PADDED)[None, None, :]
    exists = (group < G) & (member < P)
    expert = group * P + member
    address = token.to(tl.int64)[:, None, None] * (G * P) + expert
    logits = tl.load(logits_ptr + address, mask=exists & (token < N)[:, None, None], other=0.0)
    scores = 1.0 / (1.0 + tl.exp(-logits))
    biased = scores + tl.load(bias_ptr + expert, mask=exists, other=0.0)
    keys = tl.where(exists, sortable(biased), _NEVER)
    if G_CHOSEN < G:
        keys = without_other_groups(keys, biased, G_PADDED, G_CHOSEN, P_PADDED)

    LANES: tl.constexpr = G_PADDED * P_PADDED
    keys = tl.reshape(keys, (TOKENS, LANES))
    scores = tl.reshape(scores, (TOKENS, LANES))
    lane = tl.arange(0, LANES)[None, :]
    rank = tl.arange(0, K_PADDED)[None, :]
    chosen_lanes = tl.zeros((TOKENS, K_PADDED), tl.int32)
    weights = tl.zeros((TOKENS, K_PADDED), tl.float32)
    taken = tl.zeros((TOKENS, LANES), tl.int32)
    for k in tl.static_range(K):
        hit = lane == first_largest(keys, lane, 1)
        chosen_lanes += tl.where(rank == k, tl.sum(tl.where(hit, lane, 0), axis=1, keep_dims=True), 0)
        weights += tl.where(rank == k, tl.sum(tl.where(hit, scores, 0.0), axis=1, keep_dims=True), 0.0)
        taken += hit.to(tl.int32)
        keys = tl.where(hit, _NEVER, keys)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=1, keep_dims=True) + 1e-20)

    slot = token.to(tl.int64)[:, None] * K + rank
    real = (token < N)[:, None] & (rank < K)
    chosen_experts = chosen_lanes // P_PADDED * P + chosen_lanes % P_PADDED
    tl.store(experts_ptr + slot, chosen_experts, mask=real)
    tl.store(weights_ptr + slot, weights * factor, mask=real)
    counts = tl.sum(tl.where((token < N)[:, None], taken, 0), axis=0)
    lanes = tl.arange(0, LANES)
    tl.atomic_add(counts_ptr + lanes // P_PADDED * P + lanes % P_PADDED, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def offsets_kernel(counts_ptr, offsets_ptr, E, E_PADDED: tl.constexpr, MULTIPLE: tl.constexpr):
    """Sums of the counts, each rounded up to a multiple; one program."""
    expert = tl.arange(0, E_PADDED)
    counts = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    ends = tl.cumsum((counts + MULTIPLE - 1) // MULTIPLE * MULTIPLE, axis=0)
    tl.store(offsets_ptr + expert, tl.zeros_like(ends), mask=expert < 1)
    tl.store(offsets_ptr + 1 + expert, ends, mask=expert < E)


@triton.jit
def backward_kernel(
    dweights_ptr,
    logits_ptr,
    experts_ptr,
    dlogits_ptr,
    N,
    E,
    factor,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """With t = sum(s) + 1e-20 and u = s / t: ds_k = factor / t * (dw_k - sum_j dw_j u_j), and dlogit = ds s (1 - s)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rank = tl.arange(0, K_PADDED)[None, :]
    slot = token.to(tl.int64)[:, None] * K + rank
    real = (token < N)[:, None] & (rank < K)
    address = token.to(tl.int64)[:, None] * E + tl.load(experts_ptr + slot, mask=real, other=0)
    dscores = tl.load(dweights_ptr + slot, mask=real, other=0.0) * factor
    logits = tl.load(logits_ptr + address, mask=real, other=0.0)
    scores = tl.where(rank < K, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    if NORMALISE:
        total = tl.sum(scores, axis=1, keep_dims=True) + 1e-20
        dscores = (dscores - tl.sum(dscores * scores, axis=1, keep_dims=True) / total) / total
    complement = 1.0 / (1.0 + tl.exp(logits))  # 1 - s, without the cancellation where s is near 1
    tl.store(dlogits_ptr + address, dscores * scores * complement, mask=real)
