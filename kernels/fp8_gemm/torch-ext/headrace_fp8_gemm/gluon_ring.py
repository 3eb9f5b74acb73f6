"""What the warp-specialised Gluon kernels share: the ring of tiles in shared memory, its barriers, the order of tiles.

A thread block is three parties that never wait for one another as a whole. One warp, the producer, does nothing but
ask the tensor memory accelerator (TMA) for the next tiles. Two warp groups, the consumers, each own 64 of the 128
rows of the output tile: they multiply on the tensor cores (`wgmma`), scale the partial sum and add it to a total in
FP32 registers, every 128 values of the contraction (DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2: Hopper's
tensor cores keep about 14 bits of a sum). Scaling takes a quarter of the time of multiplying; it hides where the
consumers drift apart, one scaling while the other multiplies, which a barrier of the whole block in the loop would
forbid. `setmaxnreg` moves registers from the producer to the consumers.

They meet at a ring of slots with two mbarriers each. `ready` completes once the producer has arrived and the TMA has
written all the bytes it announced; `free` once both consumers have read the slot. A barrier's phases alternate
between 0 and 1, and a wait for phase p passes when that phase is over. In lap i of the ring a consumer waits for
phase i & 1 of `ready`, the producer for phase (i & 1) ^ 1 of `free`: the end of the consumers' previous lap, which a
new barrier counts as past. Thread blocks are persistent, and the laps run on from one output tile to the next: the
producer loads the next tile while the consumers store this one.

The operands lie K-major in rows of 128 bytes, swizzled over 128 bytes: what the TMA writes and `wgmma` reads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

BLOCK = gl.constexpr(128)  # rows and columns of an output tile, and values between two promotions
HALF = gl.constexpr(64)  # rows of a consumer
BAND = gl.constexpr(8)  # rows of tiles that move on together: neighbours in time share operands in L2
CONSUMERS = gl.constexpr(2)
# Hopper has 65,536 registers. 384 threads (the producer's warp is padded to a group of four) start with 168 each.
PRODUCER_REGISTERS = gl.constexpr(24)
CONSUMER_REGISTERS = gl.constexpr(240)
SHARED_LIMIT = 232_448  # bytes of shared memory that one thread block can have on Hopper
NUM_WARPS = 4  # of the first consumer; `warp_specialize` adds the others
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)

# Triton 3.9 renamed both and kept the old names as errors.
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_async = tma.async_store if hasattr(tma, "async_load") else tma.async_copy_shared_to_global


@gluon.jit
def make_barriers(SLOTS: gl.constexpr):
    """The barriers of a ring: `ready` expects the producer's arrival (and its bytes), `free` that of both consumers."""
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=CONSUMERS)
    fence_async_shared()  # the TMA signals `ready`: it has to see it initialised
    return ready, free


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot, and the phase of the lap it belongs to."""
    slot += 1
    lap = slot == SLOTS
    return gl.where(lap, 0, slot), gl.where(lap, phase ^ 1, phase)


@gluon.jit
def place(tile, tiles_m, tiles_n):
    """Row and column of a tile: bands of BAND rows of tiles, column after column inside a band."""
    band = tile // (BAND * tiles_n)
    height = min(tiles_m - band * BAND, BAND)
    inside = tile - band * BAND * tiles_n
    return band * BAND + inside % height, inside // height
