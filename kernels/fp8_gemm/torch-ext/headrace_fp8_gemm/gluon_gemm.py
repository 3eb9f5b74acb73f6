"""FP8 matrix products for Hopper, warp-specialised, in Gluon: the fast back end, with the three names of `triton_gemm`.

    dense       y = a b^T, a in 1x128 and b in 128x128 tiles
    m_grouped   the same, every 128 rows of a with the b of their expert
    k_grouped   the weight gradient of every expert: in `gluon_wgrad`

`gluon_ring` explains how producer, consumers and ring work together, `gluon_maps` what the tensor memory accelerator
(TMA) has to be told. In the loop a consumer issues four `wgmma` (128 values of K), reads the scales of its rows from
the ring while they run, waits, gives the slot back, and adds partial sum x scale to the total: 64 multiply-adds a
thread, since b has one scale for the whole tile. That one is fetched a block ahead, straight from memory. The
finished rows go through shared memory to a TMA store, which also cuts off what lies past the edge of the result.

**This code has not run on a GPU.** It compiles ahead of time for sm_90, without spills and within an instruction budget
(tests/kernels). `tests/test_gluon_protocol.py` executes this source as Python with stand-ins for barriers, copies and
products: that holds coordinates, phases and edges to account, not swizzles, fences and what the compiler makes of it.
`tests/test_gluon_gemm.py` compares with `triton_gemm` and `reference` wherever there is a Hopper GPU.

Legend: M rows, N outputs, K inputs (contraction), E experts, S rows sorted by expert.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_maps import codes_map, map_type, mn_major, multiprocessors, output_layout, output_map, scales_map
from .gluon_ring import (
    BLOCK,
    CODES,
    CONSUMER_REGISTERS,
    HALF,
    NUM_WARPS,
    PRODUCER_REGISTERS,
    SCALES,
    SHARED_LIMIT,
    advance,
    load_async,
    make_barriers,
    place,
    store_async,
)
from .gluon_wgrad import k_grouped, wgrad_variants
from .operands import blocks, check_dense, check_m_grouped, check_out_dtype

__all__ = ["dense", "gluon_variants", "k_grouped", "m_grouped"]

SLOTS = {torch.bfloat16: 5, torch.float32: 4}  # of 33,280 bytes each, beside the tile of the result


@gluon.jit
def produce(maps, ring, sizes, group_of_block, outputs, stride, SLOTS: gl.constexpr, GROUPED: gl.constexpr):
    """The producer: for every output tile and block of K, the codes of both operands and the scales of a."""
    BYTES: gl.constexpr = 2 * BLOCK * BLOCK + 4 * BLOCK
    a_map, a_scales_map, b_map = maps
    a, a_scales, b, ready, free = ring
    tiles_m, tiles_n, blocks_k = sizes
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n)
        row_b = tile_n * BLOCK
        if GROUPED:
            row_b += gl.load(group_of_block + tile_m) * outputs
        for block in range(blocks_k):
            mbarrier.wait(free.index(slot), phase ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, BYTES)
            load_async(a_map, [tile_m * BLOCK, block * BLOCK], bar, a.index(slot))
            load_async(b_map, [row_b, block * BLOCK], bar, b.index(slot))
            load_async(a_scales_map, [block * stride + tile_m * BLOCK], bar, a_scales.index(slot))
            slot, phase = advance(slot, phase, SLOTS)


@gluon.jit
def consume(
    output, ring, sizes, b_scales, group_of_block, FIRST: gl.constexpr, SLOTS: gl.constexpr, GROUPED: gl.constexpr
):
    """A consumer: rows FIRST to FIRST + 64 of every output tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    out_map, out_rows = output
    a, a_scales, b, ready, free = ring
    tiles_m, tiles_n, blocks_k = sizes
    zeros = gl.zeros([HALF, BLOCK], gl.float32, layout)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = place(tile, tiles_m, tiles_n)
        row = tile_n
        if GROUPED:
            row += gl.load(group_of_block + tile_m) * tiles_n
        scales = b_scales + row * blocks_k
        b_scale = gl.load(scales)
        total = zeros
        for block in range(blocks_k):
            next_scale = gl.load(scales + min(block + 1, blocks_k - 1))
            mbarrier.wait(ready.index(slot), phase)
            a_half = a.index(slot).slice(FIRST, HALF)
            part = warpgroup_mma(a_half, b.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            scale = a_scales.index(slot).slice(FIRST, HALF).load(by_row) * b_scale
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(free.index(slot), count=1)
            total += part * gl.expand_dims(scale, 1)
            b_scale = next_scale
            slot, phase = advance(slot, phase, SLOTS)
        tma.store_wait(0)  # the previous tile has left out_rows
        out_rows.store(total.to(out_map.dtype))
        fence_async_shared()
        store_async(out_map, [tile_m * BLOCK + FIRST, tile_n * BLOCK], out_rows)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "blocks_k", "outputs", "a_scales_stride"])
def rows_kernel(
    a_map,
    a_scales_map,
    b_map,
    out_map,
    b_scales,
    group_of_block,
    tiles_m,
    tiles_n,
    blocks_k,
    outputs,
    a_scales_stride,
    SLOTS: gl.constexpr,
    GROUPED: gl.constexpr,
):
    """One persistent thread block: makes the ring and splits into two consumers and the producer."""
    a = gl.allocate_shared_memory(a_map.dtype, [SLOTS, BLOCK, BLOCK], a_map.layout)
    b = gl.allocate_shared_memory(b_map.dtype, [SLOTS, BLOCK, BLOCK], b_map.layout)
    a_scales = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK], a_scales_map.layout)
    upper = gl.allocate_shared_memory(out_map.dtype, [HALF, BLOCK], out_map.layout)
    lower = gl.allocate_shared_memory(out_map.dtype, [HALF, BLOCK], out_map.layout)
    ready, free = make_barriers(SLOTS)
    ring = (a, a_scales, b, ready, free)
    sizes = (tiles_m, tiles_n, blocks_k)
    maps = (a_map, a_scales_map, b_map)
    gl.warp_specialize(
        [
            (consume, ((out_map, upper), ring, sizes, b_scales, group_of_block, 0, SLOTS, GROUPED)),
            (consume, ((out_map, lower), ring, sizes, b_scales, group_of_block, HALF, SLOTS, GROUPED)),
            (produce, (maps, ring, sizes, group_of_block, outputs, a_scales_stride, SLOTS, GROUPED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def dense(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """a [M, K] times b [N, K]; arguments, result and errors of `triton_gemm.dense`.

    Raises ValueError also where K is no multiple of 16, or a row of the result no multiple of 16 bytes.
    """
    check_dense(a, a_scales, b, b_scales)
    return _multiply_rows(a, a_scales, b, b_scales, None, out_dtype)


def m_grouped(
    a: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    group_of_block: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """a [S, K] times the b [E, N, K] of each block's expert; arguments, result and errors of `triton_gemm.m_grouped`.

    Raises ValueError also where K is no multiple of 16, or a row of the result no multiple of 16 bytes.
    """
    check_m_grouped(a, a_scales, b, b_scales, group_of_block)
    return _multiply_rows(a, a_scales, b, b_scales, group_of_block, out_dtype)


def _multiply_rows(
    a_MK: torch.Tensor,
    a_scales: torch.Tensor,
    b: torch.Tensor,
    b_scales: torch.Tensor,
    group_of_block: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_out_dtype(out_dtype)
    (M, K), N = a_MK.shape, b.shape[-2]
    y_MN = torch.empty((M, N), dtype=out_dtype, device=a_MK.device)
    tiles = blocks(M) * blocks(N)
    if tiles == 0 or K == 0:
        return y_MN.zero_()
    a_scales = mn_major(a_scales)
    maps = (codes_map(a_MK, "a"), scales_map(a_scales), codes_map(b.reshape(-1, K), "b"), output_map(y_MN))
    rows_kernel[(min(tiles, multiprocessors(a_MK.device)),)](
        *maps,
        b_scales.contiguous(),
        group_of_block,
        blocks(M),
        blocks(N),
        blocks(K),
        N,
        a_scales.stride(1),
        SLOTS=SLOTS[out_dtype],
        GROUPED=group_of_block is not None,
        num_warps=NUM_WARPS,
    )
    return y_MN


def gluon_variants() -> list[dict[str, Any]]:
    """What ahead-of-time compilation checks; the key `source` says how the compiler reads a Gluon kernel."""
    return [
        _rows_variant("dense_bf16", torch.bfloat16, grouped=False),
        _rows_variant("dense_fp32", torch.float32, grouped=False),
        _rows_variant("m_grouped_bf16", torch.bfloat16, grouped=True),
        *wgrad_variants(),
    ]


def _rows_variant(name: str, out_dtype: torch.dtype, grouped: bool) -> dict[str, Any]:
    codes = map_type(torch.float8_e4m3fn, [BLOCK.value, BLOCK.value], CODES)
    maps = {
        "a_map": codes,
        "a_scales_map": map_type(torch.float32, [BLOCK.value], SCALES),
        "b_map": codes,
        "out_map": map_type(out_dtype, [HALF.value, BLOCK.value], output_layout(out_dtype)),
    }
    pointers = {"b_scales": "*fp32"} | ({"group_of_block": "*i32"} if grouped else {})
    sizes = ("tiles_m", "tiles_n", "blocks_k", "outputs", "a_scales_stride")
    return {
        "name": f"gluon_{name}",
        "kernel": rows_kernel,
        "source": GluonASTSource,
        "signature": maps | pointers | dict.fromkeys(sizes, "i32"),
        "constants": {"SLOTS": SLOTS[out_dtype], "GROUPED": grouped} | ({} if grouped else {"group_of_block": None}),
        "options": {"num_warps": NUM_WARPS},
        "attributes": dict.fromkeys(pointers, 16),
        "targets": ["sm_90"],
        "expects": {"fp8_mma": True, "async_copy": True, "max_registers": 168, "max_shared": SHARED_LIMIT},
    }
