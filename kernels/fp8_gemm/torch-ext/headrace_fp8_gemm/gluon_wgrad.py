"""The weight gradient of every expert for Hopper, warp-specialised (see `gluon_ring`): `k_grouped`.

dW[e] = left[e] right[e]^T, contracted over the rows of expert e. Both operands have one scale for 128 consecutive
rows of a channel, so that every element of a partial sum has a scale of its own, left_scale[o] * right_scale[i].
These 8,192 products of a consumer (64 a thread) are formed while the tensor cores multiply; what waits for the
partial sum is one multiply-add an element. Three times 64 registers (total, partial sum, scales) is why the consumers
take 240.

The operands come through the TMA with all rows of all experts in one map: offsets are multiples of 128, so that no
block of the contraction touches two experts. The result is not stored through the TMA: its rows end where the next
expert's begin, and `accumulate` reads it first. It goes to shared memory and from there, 16 rows at a time, out in
whole lines.

**Not run on a GPU so far**: see `gluon_gemm`.

Legend: E experts, O and I outputs and inputs of a weight, S rows sorted by expert.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .gluon_maps import codes_map, map_type, mn_major, multiprocessors, scales_map
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
)
from .operands import blocks, check_k_grouped

SLOTS = 4  # of 33,792 bytes each, beside 65,536 of the result
STRIP = gl.constexpr(16)  # rows that a consumer stores at a time
RESULT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


@gluon.jit
def find(tile, offsets, sizes):
    """Expert, row and column of an output tile, and the expert's first and last block of the contraction."""
    tiles_o, tiles_i = sizes
    expert = tile // (tiles_o * tiles_i)
    tile_o, tile_i = place(tile - expert * tiles_o * tiles_i, tiles_o, tiles_i)
    first = gl.load(offsets + expert) // BLOCK
    last = gl.load(offsets + expert + 1) // BLOCK
    return expert, tile_o, tile_i, first, last


@gluon.jit
def produce(maps, ring, offsets, sizes, tiles, left_stride, right_stride, SLOTS: gl.constexpr):
    """The producer: for every output tile and block of its expert's rows, codes and scales of both operands."""
    BYTES: gl.constexpr = 2 * BLOCK * BLOCK + 2 * 4 * BLOCK
    left_map, left_scales_map, right_map, right_scales_map = maps
    left, left_scales, right, right_scales, ready, free = ring
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, tile_o, tile_i, first, last = find(tile, offsets, sizes)
        for block in range(first, last):
            mbarrier.wait(free.index(slot), phase ^ 1)
            bar = ready.index(slot)
            mbarrier.expect(bar, BYTES)
            load_async(left_map, [tile_o * BLOCK, block * BLOCK], bar, left.index(slot))
            load_async(right_map, [tile_i * BLOCK, block * BLOCK], bar, right.index(slot))
            load_async(left_scales_map, [block * left_stride + tile_o * BLOCK], bar, left_scales.index(slot))
            load_async(right_scales_map, [block * right_stride + tile_i * BLOCK], bar, right_scales.index(slot))
            slot, phase = advance(slot, phase, SLOTS)


@gluon.jit
def consume(
    out,
    out_rows,
    ring,
    offsets,
    sizes,
    tiles,
    O,  # noqa: E741
    I,  # noqa: E741
    FIRST: gl.constexpr,
    SLOTS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):
    """A consumer: rows FIRST to FIRST + 64 of every output tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    left, left_scales, right, right_scales, ready, free = ring
    zeros = gl.zeros([HALF, BLOCK], gl.float32, layout)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, tile_o, tile_i, first, last = find(tile, offsets, sizes)
        total = zeros
        for _ in range(first, last):
            mbarrier.wait(ready.index(slot), phase)
            left_half = left.index(slot).slice(FIRST, HALF)
            part = warpgroup_mma(left_half, right.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
            left_scale = left_scales.index(slot).slice(FIRST, HALF).load(by_row)
            right_scale = right_scales.index(slot).load(by_column)
            scale = gl.expand_dims(left_scale, 1) * gl.expand_dims(right_scale, 0)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(free.index(slot), count=1)
            total += part * scale
            slot, phase = advance(slot, phase, SLOTS)
        out_rows.store(total)
        row = tile_o * BLOCK + FIRST
        column = tile_i * BLOCK
        corner = out + (expert.to(gl.int64) * O + row) * I + column
        for strip in gl.static_range(0, HALF, STRIP):
            store_strip(corner + strip * I, out_rows.slice(strip, STRIP), O - row - strip, I - column, I, ACCUMULATE)


@gluon.jit
def store_strip(corner, values, rows_left, columns_left, I, ACCUMULATE: gl.constexpr):  # noqa: E741
    """Write STRIP rows from shared memory to the result, or add them to it; a warp handles 512 consecutive bytes."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    rows = gl.arange(0, STRIP, gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    places = corner + (gl.expand_dims(rows * I, 1) + gl.expand_dims(columns, 0))
    inside = gl.expand_dims(rows < rows_left, 1) & gl.expand_dims(columns < columns_left, 0)
    total = values.load(layout)
    if ACCUMULATE:
        total += gl.load(places, mask=inside, other=0.0)
    gl.store(places, total, mask=inside)


@gluon.jit(do_not_specialize=["tiles_o", "tiles_i", "tiles", "O", "left_stride", "right_stride"])
def weight_gradient_kernel(
    left_map,
    left_scales_map,
    right_map,
    right_scales_map,
    offsets,
    out,
    tiles_o,
    tiles_i,
    tiles,
    O,  # noqa: E741
    I,  # noqa: E741
    left_stride,
    right_stride,
    SLOTS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):
    """One persistent thread block: makes the ring and splits into two consumers and the producer."""
    left = gl.allocate_shared_memory(left_map.dtype, [SLOTS, BLOCK, BLOCK], left_map.layout)
    right = gl.allocate_shared_memory(right_map.dtype, [SLOTS, BLOCK, BLOCK], right_map.layout)
    left_scales = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK], left_scales_map.layout)
    right_scales = gl.allocate_shared_memory(gl.float32, [SLOTS, BLOCK], right_scales_map.layout)
    upper = gl.allocate_shared_memory(gl.float32, [HALF, BLOCK], RESULT)
    lower = gl.allocate_shared_memory(gl.float32, [HALF, BLOCK], RESULT)
    ready, free = make_barriers(SLOTS)
    ring = (left, left_scales, right, right_scales, ready, free)
    maps = (left_map, left_scales_map, right_map, right_scales_map)
    sizes = (tiles_o, tiles_i)
    gl.warp_specialize(
        [
            (consume, (out, upper, ring, offsets, sizes, tiles, O, I, 0, SLOTS, ACCUMULATE)),
            (consume, (out, lower, ring, offsets, sizes, tiles, O, I, HALF, SLOTS, ACCUMULATE)),
            (produce, (maps, ring, offsets, sizes, tiles, left_stride, right_stride, SLOTS)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def k_grouped(
    left_t: torch.Tensor,
    left_scales: torch.Tensor,
    right_t: torch.Tensor,
    right_scales: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
) -> torch.Tensor:
    """The weight gradient of every expert; arguments, result and errors of `triton_gemm.k_grouped`.

    O and I may be any number: what lies past the edge of an expert's gradient is not stored.
    """
    check_k_grouped(left_t, left_scales, right_t, right_scales, offsets, out)
    E, O, I = out.shape  # noqa: E741
    tiles = E * blocks(O) * blocks(I)
    if tiles == 0:
        return out
    if left_t.shape[1] == 0:  # no rows at all: there is nothing that a tensor map could describe
        return out if accumulate else out.zero_()
    left_scales, right_scales = mn_major(left_scales), mn_major(right_scales)
    maps = (
        codes_map(left_t, "left_t"),
        scales_map(left_scales),
        codes_map(right_t, "right_t"),
        scales_map(right_scales),
    )
    weight_gradient_kernel[(min(tiles, multiprocessors(out.device)),)](
        *maps,
        offsets,
        out,
        blocks(O),
        blocks(I),
        tiles,
        O,
        I,
        left_scales.stride(1),
        right_scales.stride(1),
        SLOTS=SLOTS,
        ACCUMULATE=accumulate,
        num_warps=NUM_WARPS,
    )
    return out


def wgrad_variants() -> list[dict]:
    """What ahead-of-time compilation checks."""
    codes = map_type(torch.float8_e4m3fn, [BLOCK.value, BLOCK.value], CODES)
    scales = map_type(torch.float32, [BLOCK.value], SCALES)
    maps = {"left_map": codes, "left_scales_map": scales, "right_map": codes, "right_scales_map": scales}
    sizes = ("tiles_o", "tiles_i", "tiles", "O", "I", "left_stride", "right_stride")
    return [
        {
            "name": f"gluon_k_grouped{'_accumulate' if accumulate else ''}",
            "kernel": weight_gradient_kernel,
            "source": GluonASTSource,
            "signature": maps | {"offsets": "*i32", "out": "*fp32"} | dict.fromkeys(sizes, "i32"),
            "constants": {"SLOTS": SLOTS, "ACCUMULATE": accumulate},
            "options": {"num_warps": NUM_WARPS},
            "attributes": {"offsets": 16, "out": 16, "I": 16},
            "targets": ["sm_90"],
            "expects": {"fp8_mma": True, "async_copy": True, "max_registers": 168, "max_shared": SHARED_LIMIT},
        }
        for accumulate in (False, True)
    ]
