"""Dispatch and combine between the GPUs of one node, in CUDA with PTX (dispatch_cuda/movers.cu), built on demand.

    plan = BufferPlan(ranks=8, capacity=4096, columns=7168, chosen=8, experts_per_rank=32)
    exchange = connect(plan, rank, gather)       # once; gather(tensor) -> the tensors of all ranks, in order
    received = exchange.dispatch(codes, scales, experts, weights)
    layout = lay_out(received.experts, plan.experts_per_rank, first=rank * plan.experts_per_rank)
    ...                                          # permute_quantised, the experts, then
    combine(rows, layout, out=exchange.results)
    y, _ = exchange.combine(experts)

Nothing is compiled at import. The first exchange builds the extension with torch.utils.cpp_extension (about a minute;
kept in torch's cache afterwards), which needs nvcc, ninja and a GPU of compute capability 9.0; a missing one is a
RuntimeError of one line. Where kernel-builder has compiled the package, what it compiled is used instead.

Dispatch and combine alternate; that is what keeps a buffer from being overwritten while others read it (movers.cu). One
exchange serves one stream. The count of rounds is a kernel argument, so it cannot be captured in a CUDA graph.

Not tried on GPUs by its authors: compiled, and its arithmetic tested through PlainExchange in peers.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .peers import BufferPlan, Received

_SOURCES = ("torch_binding.cpp", "dispatch_cuda/movers.cu")
_NVCC_FLAGS = ["-O3", "-gencode", "arch=compute_90a,code=sm_90a"]
_TIMEOUT_MS = 100_000


@functools.cache
def operations(plain_loads: bool = False) -> Any:
    """The compiled operators. ``plain_loads`` compiles coherent loads in place of DeepSeek's cache hints."""
    if not torch.cuda.is_available():
        raise RuntimeError("the data movers of headrace_dispatch run on CUDA devices, and torch sees none here")
    if torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError(f"headrace_dispatch's data movers are built for sm_90a, not {torch.cuda.get_device_name()}")
    if importlib.util.find_spec("._ops", __package__) and not plain_loads:
        return importlib.import_module("._ops", __package__).ops
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or shutil.which("ninja") is None:
        raise RuntimeError("headrace_dispatch builds its data movers with nvcc and ninja: install both, set CUDA_HOME")
    here = Path(__file__).parent
    name = "headrace_dispatch_movers" + ("_plain_loads" if plain_loads else "")
    cpp_extension.load(
        name,
        [str(here / source) for source in _SOURCES],
        extra_include_paths=[str(here)],
        extra_cflags=["-O2"],
        extra_cuda_cflags=[*_NVCC_FLAGS, *(["-DHEADRACE_PLAIN_LOADS"] if plain_loads else [])],
        is_python_module=False,
    )
    return getattr(torch.ops, name)


class Exchange:
    """One rank's side. ``addresses`` are those of all ranks' buffers as this process maps them, its own at ``rank``."""

    def __init__(
        self, plan: BufferPlan, rank: int, addresses: list[int], blocks: int = 20, plain_loads: bool = False
    ) -> None:
        """``blocks`` is the number of SMs that moving data takes (DeepSeek-V3 gives 20 of 132)."""
        self.plan, self.rank, self.blocks = plan, rank, blocks
        self._operations = operations(plain_loads)
        self._peers = (list(addresses), plan.offsets, rank)
        self._shape = (plan.experts_per_rank, plan.capacity)
        self._buffer = self._operations.view(addresses[rank], plan.bytes)
        self._epoch = 0
        self.results = plan.results(self._buffer)  # BF16 [R * M, D]: write the experts' results here before combine
        self.result_weights = plan.result_weights(self._buffer)  # FP32 [R * M, K]: the routing weights' gradients

    def dispatch(
        self, rows: torch.Tensor, scales: torch.Tensor | None, experts: torch.Tensor, weights: torch.Tensor
    ) -> Received:
        """Send ``rows`` [N, D] (BF16, or E4M3 with ``scales`` FP32 [N, D / 128]) and wait for what the others send."""
        self.push(rows, scales, experts, weights)
        self.wait()
        return self.plan.received(self._buffer, rows.dtype)

    def combine(self, experts: torch.Tensor, fetch_weights: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Once ``results`` are written: the sums BF16 [N, D] of this rank's tokens, and the weights' gradients."""
        self.signal()
        self.wait()
        return self.pull(experts, fetch_weights)

    def push(
        self, rows: torch.Tensor, scales: torch.Tensor | None, experts: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """First half of ``dispatch``: send and announce."""
        self._next_epoch(odd=True)
        if rows.shape[1:] != (self.plan.columns,) or (scales is None) != (rows.element_size() == 2):
            raise ValueError(f"rows are {rows.dtype} {list(rows.shape)}: BF16, or one byte each and with scales")
        scales = None if scales is None else scales.contiguous()
        self._operations.push(rows, scales, experts, weights, *self._peers, *self._shape, self._epoch, self.blocks)

    def signal(self) -> None:
        """First part of ``combine``: announce that ``results`` are complete."""
        self._next_epoch(odd=False)
        self._operations.signal(*self._peers, self._epoch)

    def wait(self) -> None:
        """Hold the stream until all ranks have announced as much as this one."""
        self._operations.wait(*self._peers, self._epoch, _TIMEOUT_MS)

    def pull(self, experts: torch.Tensor, fetch_weights: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last part of ``combine``: read and add."""
        out = torch.empty((len(experts), self.plan.columns), dtype=torch.bfloat16, device=experts.device)
        weights = torch.empty(experts.shape, dtype=torch.float32, device=experts.device) if fetch_weights else None
        self._operations.pull(out, weights, experts, *self._peers, *self._shape, self.blocks)
        return out, weights

    def _next_epoch(self, odd: bool) -> None:
        self._epoch += 1
        if (self._epoch % 2 == 1) != odd:
            raise RuntimeError("dispatch and combine have to alternate: buffers are in use until the other is done")


def connect(
    plan: BufferPlan, rank: int, gather: Callable[[torch.Tensor], list[torch.Tensor]], blocks: int = 20
) -> Exchange:
    """Allocate this rank's buffer on the current device, share it with the other processes, map theirs.

    ``gather`` takes 64 bytes (uint8, on the CPU) and returns those of all ranks in order, as an all-gather does. The
    buffers live as long as the process.
    """
    ops = operations()
    own = ops.allocate(plan.bytes)
    shared = gather(ops.share(own))
    if len(shared) != plan.ranks:
        raise ValueError(f"gather returned {len(shared)} handles; the plan has {plan.ranks} ranks")
    addresses = [own if other == rank else ops.map(handle) for other, handle in enumerate(shared)]
    return Exchange(plan, rank, addresses, blocks)
