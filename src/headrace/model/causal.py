"""Causal attention in blocks of queries, for heads whose keys and values differ in width.

MLA's queries and keys are wider than its values (192 and 128 in V3), a shape for which PyTorch's CPU attention falls
back to the full square of scores. Here a block of queries meets only the keys it may see, so the upper half of the
square is never computed, and the softmax is taken over whole rows. On CUDA the values are padded to the keys' width and
PyTorch's fused attention does the work.

Documents of a row that do not see each other: a block leaves out the keys before the documents of its queries. On CUDA
fused attention is given a mask of T x T booleans per row, and computes the whole square.

Up to `_KEEP` tokens the probabilities are kept for the backward pass; above, they are computed again. Queries, keys and
values are kept unless the caller says how to compute them `again`.
Shapes: G = batch * heads, T tokens, Q queries of a block, K keys it sees, D key width, V value width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from headrace.fp8.gemms import wide
from headrace.fp8.products import bmm

_BLOCK = 128  # queries per block
_KEEP = 1024  # tokens


Expand = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Computes queries, keys and values again."""


def causal_attention(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTV: Tensor, again: Expand | None = None, starts_BT: Tensor | None = None
) -> Tensor:
    """softmax(q k^T + causal mask) v as [B, T, H, V]; `q` is already scaled. Softmax and sums in FP32.

    With `again` the three are not kept for the backward pass; it must give the same values. `starts_BT` int64 [B, T],
    never falling along a row, is the first token that each one sees; None: the row's first.
    """
    on_cpu = q_BHTD.device.type == "cpu"
    missing = 0 if on_cpu else max(0, q_BHTD.shape[-1] - v_BHTV.shape[-1])
    padded = functional.pad(v_BHTV, (0, missing)) if missing else v_BHTV
    with _Forgotten((q_BHTD, k_BHTD, padded), again, missing).hooks() if again else nullcontext():
        if on_cpu:
            result: Tensor = _BlockwiseAttention.apply(q_BHTD, k_BHTD, v_BHTV, starts_BT)  # type: ignore[no-untyped-call]
            return result
        visible = None if starts_BT is None else visible_keys(starts_BT)[:, None]
        out = functional.scaled_dot_product_attention(
            q_BHTD, k_BHTD, padded, visible, is_causal=visible is None, scale=1.0
        )
    return out[..., : v_BHTV.shape[-1]].transpose(1, 2)


def visible_keys(starts_BT: Tensor) -> Tensor:
    """bool [B, T, T]: whether a query sees a key, from its `starts_BT` up to itself."""
    at = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    return (starts_BT[..., None] <= at) & (at <= at[:, None])


class _Forgotten:
    """Saved-tensor hooks that replace queries, keys and values by a note which of them it was, and in which view."""

    def __init__(self, tensors: tuple[Tensor, ...], again: Expand, missing: int) -> None:
        self._which = {tensor.untyped_storage().data_ptr(): index for index, tensor in enumerate(tensors)}
        self._again, self._missing = again, missing
        self._restored: tuple[Tensor, ...] = ()
        self._left = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context to run the attention in."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        index = self._which.get(tensor.untyped_storage().data_ptr())
        return tensor if index is None else (index, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not self._left:
            with torch.no_grad():
                q, k, v = self._again()
            self._restored, self._left = (q, k, functional.pad(v, (0, self._missing)) if self._missing else v), 3
        index, shape, stride, offset = packed
        restored: Tensor = self._restored[index].as_strided(shape, stride, offset)
        self._left -= 1
        if not self._left:
            self._restored = ()
        return restored


def _keys(starts_BT: Tensor | None, start: int, end: int) -> tuple[slice, Tensor | None]:
    """The keys of the block of queries from `start` to `end`, and which of them is each query's first, [B, Q]."""
    if starts_BT is None:
        return slice(end), None
    first = int(starts_BT[:, start].min())
    return slice(first, end), starts_BT[:, start:end] - first


def _probabilities(q_GQD: Tensor, k_GKD: Tensor, first_BQ: Tensor | None) -> Tensor:
    """Softmax over the keys [G, Q, K]; the last Q keys are at the queries' own positions."""
    scores = bmm(q_GQD, k_GKD.transpose(1, 2))
    queries = q_GQD.shape[1]
    future = torch.full((queries, queries), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores[..., -queries:] += future
    if first_BQ is not None:
        others = torch.arange(scores.shape[-1], device=scores.device) < first_BQ[:, None, :, None]
        scores.view(len(first_BQ), -1, *scores.shape[1:]).masked_fill_(others, float("-inf"))
    return torch.softmax(scores, dim=-1)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = q.shape
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = v.new_empty(batch, tokens, heads, v.shape[-1])
        kept = []
        for start in range(0, tokens, _BLOCK):
            end = min(start + _BLOCK, tokens)
            seen, first = _keys(starts, start, end)
            probabilities = _probabilities(q[:, start:end], k[:, seen], first)
            block = bmm(probabilities, v[:, seen])
            out[:, start:end] = block.view(batch, heads, end - start, -1).transpose(1, 2)
            if tokens <= _KEEP:
                kept.append(probabilities)
        ctx.save_for_backward(q, k, v, starts, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, starts, *kept = ctx.saved_tensors
        batch, tokens, heads, width = dout.shape
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide(k.dtype)), torch.zeros_like(v, dtype=wide(v.dtype))
        for index, start in enumerate(range(0, tokens, _BLOCK)):
            end = min(start + _BLOCK, tokens)
            seen, first = _keys(starts, start, end)
            probabilities = kept[index] if kept else _probabilities(q[:, start:end], k[:, seen], first)
            block = dout[:, start:end].transpose(1, 2).reshape(batch * heads, end - start, width)
            dv[:, seen] += bmm(probabilities.transpose(1, 2), block)
            dprobabilities = bmm(block, v[:, seen].transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, q.dtype)
            bmm(dscores, k[:, seen], out=dq[:, start:end])
            dk[:, seen] += bmm(dscores.transpose(1, 2), q[:, start:end])
        shape = (batch, heads, tokens, -1)
        return dq.view(shape), dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape), None
