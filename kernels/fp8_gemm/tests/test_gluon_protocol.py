"""The Gluon kernels' own source, executed on a CPU: barriers, phases, coordinates, scales, edges, not swizzles.

Gluon has no interpreter, but a kernel is a Python function. `Machine` runs it with stand-ins for what it calls: three
threads for the parties of a thread block, mbarriers that count arrivals and bytes, copies that arrive late and out of
order, operands that are read when `wgmma` is waited for, and results that leave shared memory when the store is
waited for. A slot given back too early, a wrong phase, coordinate or byte count then shows as a wrong number, a
refused arrival or a timeout. A barrier between threads of one party, which the compiler adds, cannot be missed here.
"""

import random
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from triton.experimental.gluon import language as gluon_language

from headrace_fp8_gemm import gluon_gemm, gluon_ring, gluon_wgrad

PATIENCE = 60.0  # seconds that a party waits at a barrier before the test calls it a deadlock


class Int(int):
    """A scalar of a kernel: an integer whose arithmetic stays one, and which can be cast."""

    def to(self, dtype: object) -> "Int":
        return self


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "xor"):
    _plain = getattr(int, f"__{_name}__")

    def _operate(self, other, _plain=_plain):
        result = _plain(self, other)
        return Int(result) if isinstance(result, int) else result

    setattr(Int, f"__{_name}__", _operate)


class Value(np.ndarray):
    """A tensor in registers: never changed in place."""

    def __iadd__(self, other: Any) -> "Value":
        return self + other

    def to(self, dtype: torch.dtype) -> "Value":
        return torch.from_numpy(np.asarray(self)).to(dtype).float().numpy().view(Value)


class Pointer:
    """Places in a tensor's memory."""

    def __init__(self, memory: torch.Tensor, places: Any = 0) -> None:
        self.memory, self.places = memory, places

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.places + np.asarray(offset))


class Shared:
    """A view of shared memory."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def index(self, slot: int) -> "Shared":
        return Shared(self.data[slot])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.data[start : start + length])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.transpose(order))

    def load(self, layout: object) -> Value:
        return self.data.copy().view(Value)

    def store(self, value: Value) -> None:
        self.data[...] = value


class Barrier:
    """An mbarrier: a phase is over when all arrivals and all announced bytes are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.arrivals_left = self.bytes_left = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.arrivals_left = count

    def update(self, arrivals: int = 0, announced: int = 0) -> None:
        with self.changed:
            self.arrivals_left -= arrivals
            self.bytes_left += announced
            assert self.arrivals_left >= 0, "more arrivals than the barrier counts"
            if self.arrivals_left == self.bytes_left == 0:
                self.phase ^= 1
                self.arrivals_left = self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            over = self.changed.wait_for(lambda: self.phase != phase, PATIENCE)
        assert over, f"deadlock: {self.arrivals_left} arrivals and {self.bytes_left} bytes are missing"


class Barriers(list):
    """The barriers of a ring."""

    index = list.__getitem__


class Map:
    """A tensor map: boxes of a tensor, zeros outside it, nothing written outside it."""

    def __init__(self, descriptor: Any) -> None:
        self.box, self.dtype, self.layout = descriptor.block_shape, descriptor.base.dtype, descriptor.layout
        self.memory = descriptor.base.as_strided(tuple(descriptor.shape), tuple(descriptor.strides), 0)
        assert all(stride * self.memory.element_size() % 16 == 0 for stride in descriptor.strides[:-1])

    def _inside(self, coordinates: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        ends = [max(min(self.memory.shape[i] - c, self.box[i]), 0) for i, c in enumerate(coordinates)]
        there = tuple(slice(c, c + end) for c, end in zip(coordinates, ends, strict=True))
        return there, tuple(slice(0, end) for end in ends)

    def read(self, coordinates: list[int]) -> np.ndarray:
        there, here = self._inside(coordinates)
        box = np.zeros(self.box, np.float32)
        box[here] = self.memory[there].float().numpy()
        return box

    def write(self, coordinates: list[int], box: np.ndarray) -> None:
        there, here = self._inside(coordinates)
        self.memory[there] = torch.from_numpy(box[here].copy()).to(self.dtype)


class Machine:
    """Runs a Gluon kernel as Python, thread block after thread block; launched as `machine[grid](...)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grid, self.block = kernel, (0,), 0
        self.copies = ThreadPoolExecutor(max_workers=6)
        self.late = random.Random(0)
        self.pending = threading.local()

    def __getitem__(self, grid: tuple[int]) -> "Machine":
        self.grid = grid
        return self

    def __call__(self, *arguments: Any, num_warps: int, **constants: Any) -> None:
        translated = [self.translate(argument) for argument in arguments]
        for block in range(self.grid[0]):
            self.block = block
            self.python(self.kernel)(*translated, **constants)

    def translate(self, argument: Any) -> Any:
        if hasattr(argument, "block_shape"):
            return Map(argument)
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous()
            return Pointer(argument.view(-1))
        return Int(argument) if isinstance(argument, int) else argument

    def python(self, kernel: Any) -> types.FunctionType:
        """The function under the decorator, with stand-ins for the names it uses."""
        used = {
            name: kernel.fn.__globals__[name] for name in kernel.fn.__code__.co_names if name in kernel.fn.__globals__
        }
        names = {name: self.python(value) if hasattr(value, "fn") else value for name, value in used.items()}
        names |= {name: value.value for name, value in used.items() if isinstance(value, gluon_language.constexpr)}
        names |= {
            "gl": self,
            "mbarrier": self,
            "tma": self,
            "range": lambda *limits: map(Int, range(*limits)),
            "load_async": self.load_async,
            "store_async": self.store_async,
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": lambda count, deps: deps[0](),
        }
        return types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__, kernel.fn.__defaults__)

    # The language.
    constexpr, int64, float32 = object, "int64", torch.float32
    static_range = range
    MBarrierLayout = NVMMADistributedLayout = SliceLayout = BlockedLayout = staticmethod(lambda *a, **k: None)
    expand_dims = staticmethod(np.expand_dims)
    arange = staticmethod(lambda start, end, layout: np.arange(start, end).view(Value))
    zeros = staticmethod(lambda shape, dtype, layout: np.zeros(shape, np.float32).view(Value))
    where = staticmethod(lambda condition, yes, no: yes if condition else no)

    def program_id(self, axis: int) -> Int:
        return Int(self.block)

    def num_programs(self, axis: int) -> int:
        return self.grid[0]

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0.0) -> Any:
        places = np.where(mask, pointer.places, 0)
        values = np.where(mask, pointer.memory.numpy()[places], other)
        if values.ndim == 0:
            return Int(values) if pointer.memory.dtype == torch.int32 else np.float32(values)
        return values.view(Value)

    def store(self, pointer: Pointer, values: Value, mask: np.ndarray) -> None:
        pointer.memory.numpy()[pointer.places[mask]] = values[mask]

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: object) -> Any:
        if dtype == self.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Shared(np.full(shape, np.nan, np.float32))

    def warp_specialize(self, parties: list, warps: list[int], registers: list[int]) -> None:
        def run(function: Any, arguments: tuple) -> None:
            self.pending.stores = []
            function(*arguments)
            assert not self.pending.stores, "a store was not waited for"

        with ThreadPoolExecutor(max_workers=len(parties)) as threads:
            for party in [threads.submit(run, function, arguments) for function, arguments in parties]:
                party.result()

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.init(count)

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.update(arrivals=1, announced=size)

    def wait(self, barrier: Barrier, phase: int) -> None:
        barrier.wait(phase)

    def arrive(self, barrier: Barrier, count: int) -> None:
        barrier.update(arrivals=count)

    def load_async(self, tensor_map: Map, coordinates: list[int], barrier: Barrier, target: Shared) -> None:
        assert target.data.shape == tuple(tensor_map.box)
        delay = self.late.choice([0.0, 0.0, 0.001])

        def arrive_late() -> None:
            target.data[...] = np.nan
            time.sleep(delay)
            target.data[...] = tensor_map.read(coordinates)
            barrier.update(announced=-target.data.size * tensor_map.dtype.itemsize)

        self.copies.submit(arrive_late)

    def warpgroup_mma(self, a: Shared, b: Shared, total: Value, use_acc: bool, is_async: bool) -> Any:
        assert is_async
        assert not use_acc
        return lambda: (a.data @ b.data).view(Value)

    def store_async(self, tensor_map: Map, coordinates: list[int], source: Shared) -> None:
        self.pending.stores.append(lambda: tensor_map.write(coordinates, source.data))

    def store_wait(self, count: int) -> None:
        for store in self.pending.stores:
            store()
        self.pending.stores.clear()


@pytest.fixture
def launch(monkeypatch):
    """The host code of the back end, unchanged, with `Machine` for a GPU of that many multiprocessors."""

    def use(multiprocessors: int) -> None:
        monkeypatch.setattr(gluon_gemm, "rows_kernel", Machine(gluon_gemm.rows_kernel))
        monkeypatch.setattr(gluon_wgrad, "weight_gradient_kernel", Machine(gluon_wgrad.weight_gradient_kernel))
        for module in (gluon_gemm, gluon_wgrad):
            monkeypatch.setattr(module, "multiprocessors", lambda device: multiprocessors)

    if torch.cuda.is_available():
        pytest.skip("a CUDA device: test_gluon_gemm.py runs the compiled kernels")
    return use


@pytest.mark.parametrize("multiprocessors", [1, 4])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(128, 128, 128), (128, 256, 1536), (1, 136, 272), (200, 264, 704), (1300, 128, 144)]
)
def test_dense_as_written(products, launch, M, N, K, multiprocessors):
    launch(multiprocessors)
    blocks = -(-K // 128)
    a, a_scales = products.codes(M, K), products.scales(M, blocks, mn_major=True)
    b, b_scales = products.codes(N, K), products.scales(-(-N // 128), blocks)
    y = gluon_gemm.dense(a, a_scales, b, b_scales, torch.float32)
    products.assert_close(y, products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128)))
    assert torch.equal(gluon_gemm.dense(a, a_scales, b, b_scales), y.bfloat16())


def test_m_grouped_as_written(products, launch):
    launch(3)
    N, K = 136, 384
    groups = torch.tensor([2, 0, 0, 3, 2], dtype=torch.int32)
    a, a_scales = products.codes(640, K), products.scales(640, 3, mn_major=True)
    b, b_scales = products.codes(4, N, K), products.scales(4, 2, 3)
    y = gluon_gemm.m_grouped(a, a_scales, b, b_scales, groups, torch.float32)
    left, right = products.decode(a, a_scales, (1, 128)), products.decode(b, b_scales, (128, 128))
    for block, expert in enumerate(groups.tolist()):
        rows = slice(128 * block, 128 * (block + 1))
        products.assert_close(y[rows], left[rows], right[expert])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("O", "I"), [(128, 256), (200, 136), (64, 100)])
def test_k_grouped_as_written(products, launch, O, I, accumulate):  # noqa: E741
    launch(2)
    offsets, S = torch.tensor([0, 256, 256, 1024, 1152], dtype=torch.int32), 1280  # one is empty, the end is nobody's
    left, left_scales = products.codes(O, S), products.scales(O, S // 128, mn_major=True)
    right, right_scales = products.codes(I, S), products.scales(I, S // 128, mn_major=True)
    before = torch.randn(4, O, I) * 1e4
    out = gluon_gemm.k_grouped(left, left_scales, right, right_scales, offsets, before.clone(), accumulate)
    left_64, right_64 = products.decode(left, left_scales, (1, 128)), products.decode(right, right_scales, (1, 128))
    for expert in range(4):
        rows = slice(*offsets[expert : expert + 2].tolist())
        was = before[expert].double().numpy() if accumulate else 0.0
        products.assert_close(out[expert], left_64[:, rows], right_64[:, rows], was)


def test_every_tile_has_one_place():
    place = Machine(gluon_ring.place).python(gluon_ring.place)
    for tiles_m, tiles_n in [(1, 1), (8, 3), (9, 5), (23, 7)]:
        places = {tuple(map(int, place(Int(tile), tiles_m, tiles_n))) for tile in range(tiles_m * tiles_n)}
        assert places == {(m, n) for m in range(tiles_m) for n in range(tiles_n)}
