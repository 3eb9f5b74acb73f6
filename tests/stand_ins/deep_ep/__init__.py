"""A stand-in for DeepEP (github.com/deepseek-ai/DeepEP) on CPUs: the part of `Buffer` that headrace uses, over gloo.

Signatures, results, demands on arguments, the order of received rows and the order and roundings of sums were read in
DeepEP's sources: deep_ep/buffers/legacy.py at 189df346, csrc/deep_ep.cpp at 011d766f, csrc/kernels/legacy/intranode.cu
at 4e38668b, internode.cu at 0e89fa08, csrc/config.hpp at 030cdf0a. The stricter of two versions counts: rows of 32
bytes (intranode kernels of version 1.2 for Hopper), sums of 512 (internode). `Buffer.node` is 8 there (configs.cuh);
tests make it smaller. Kernels, streams, timeouts and the limits of memory are not imitated.
"""

import torch
from torch import Tensor, distributed

__version__ = "1.2.1"
topk_idx_t = torch.int64


class Config:
    def __init__(
        self,
        num_sms: int,
        num_max_nvl_chunked_send_tokens: int,
        num_max_nvl_chunked_recv_tokens: int,
        num_max_rdma_chunked_send_tokens: int,
        num_max_rdma_chunked_recv_tokens: int,
    ) -> None:
        self.channels = num_sms // 2
        self.nvlink, self.rdma = num_max_nvl_chunked_recv_tokens, num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        ranks = min(num_ranks, Buffer.node)
        return -(-self.channels * ranks * self.nvlink * (hidden_bytes + 128 * 16) // 128) * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= Buffer.node:
            return 0
        return -(-self.channels * (num_ranks // Buffer.node) * self.rdma * (hidden_bytes + 128 * 16) // 128) * 128


class EventOverlap:
    def __init__(self, event=None) -> None:
        self.event = event


class Buffer:
    num_sms = 20
    node = 8

    def __init__(
        self,
        group: distributed.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        comm=None,
    ) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        assert num_nvl_bytes % 128 == num_rdma_bytes % 128 == 0
        assert self.group_size < self.node or self.group_size % self.node == 0
        assert (num_rdma_bytes > 0) == self._across
        self.calls: list[str] = []

    @property
    def _across(self) -> bool:
        return self.group_size > self.node

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Buffer.get_dispatch_config(num_ranks)

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t and num_experts > 0
        rank_NK = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.group_size), -1)
        reached_NP = torch.stack([(rank_NK == rank).any(1) for rank in range(self.group_size)], 1)
        per_node = None
        if self._across:
            per_node = reached_NP.unflatten(1, (-1, self.node)).any(2).sum(0).int()
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return reached_NP.sum(0).int(), per_node, per_expert, reached_NP, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16
        self._fits(x, 32)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            reached_NP, arrived = handle
            self.calls.append("dispatch again")
            return self._sent(x, reached_NP, arrived), None, None, None, None, EventOverlap()
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert is_token_in_rank.dtype == torch.bool and is_token_in_rank.shape == (len(x), self.group_size)
        assert self._across == (num_tokens_per_rdma_rank is not None)
        assert topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t and topk_idx.shape == topk_weights.shape
        assert topk_weights.is_contiguous() and topk_weights.dtype == torch.float32 and topk_idx.shape[1] <= 32
        assert len(num_tokens_per_expert) % self.group_size == 0
        each = [1] * self.group_size
        arrived = self._exchanged(num_tokens_per_rank[:, None], each, each).flatten().tolist()
        ids, weights = (self._sent(each, is_token_in_rank, arrived) for each in (topk_idx, topk_weights))
        share = len(num_tokens_per_expert) // self.group_size
        local = ids - self.rank * share
        elsewhere = (ids < 0) | (local < 0) | (local >= share)
        local, weights = local.masked_fill(elsewhere, -1), weights.masked_fill(elsewhere, 0)
        counts = [-(-int((local == each).sum()) // expert_alignment) * expert_alignment for each in range(share)]
        self.calls.append("dispatch")
        handle = is_token_in_rank, arrived
        return self._sent(x, is_token_in_rank, arrived), local, weights, counts, handle, EventOverlap()

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias=None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16
        self._fits(x, 512)
        reached_NP, arrived = handle
        assert len(x) == sum(arrived)
        self.calls.append("combine")
        weights = None
        if topk_weights is not None:
            assert topk_weights.is_contiguous() and topk_weights.dtype == torch.float32 and len(topk_weights) == len(x)
            weights = self._summed(topk_weights, reached_NP, arrived)
        return self._summed(x, reached_NP, arrived), weights, EventOverlap()

    def _fits(self, x: Tensor, multiple: int) -> None:
        """Rows of the alignment that kernels want, and no wider than the buffers were made for."""
        width, ranks = 2 * x.shape[1], min(self.group_size, self.node)
        assert width % multiple == 0
        assert self.num_sms // 2 * ranks * 256 * width <= self.num_nvl_bytes

    def _sent(self, x: Tensor, reached_NP: Tensor, arrived: list[int]) -> Tensor:
        """By the rank that sends, then in the order of its tokens."""
        token = reached_NP.T.nonzero()[:, 1]
        return self._exchanged(x[token], reached_NP.sum(0).tolist(), arrived)

    def _summed(self, x: Tensor, reached_NP: Tensor, arrived: list[int]) -> Tensor:
        """Over the ranks of a node, rounded if there are more nodes, then over nodes; in FP32 and ascending."""
        back = self._exchanged(x, arrived, reached_NP.sum(0).tolist()).split(reached_NP.sum(0).tolist())
        total = torch.zeros(len(reached_NP), x.shape[1])
        for first in range(0, self.group_size, self.node):
            part = torch.zeros_like(total)
            for rank in range(first, min(first + self.node, self.group_size)):
                part[reached_NP[:, rank]] += back[rank].float()
            total += part.to(x.dtype).float() if self._across else part
        return total.to(x.dtype)

    def _exchanged(self, rows: Tensor, sent: list[int], arrived: list[int]) -> Tensor:
        out = rows.new_empty(sum(arrived), rows.shape[1])
        bytes_out, bytes_in = (each.view(torch.uint8) for each in (out, rows.contiguous()))
        distributed.all_to_all_single(bytes_out, bytes_in, arrived, sent, group=self.group)
        return out
