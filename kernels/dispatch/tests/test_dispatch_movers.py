"""The CUDA data movers: what they say where they cannot be built; on a GPU, the same bytes as the plain exchange.

One GPU plays all four ranks: four buffers on it, an Exchange each, launched one after the other on one stream. That
shows addresses, slots, sums and epochs; not NVLink, nor processes that share memory, nor ranks at the same time.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

import headrace_dispatch.movers as movers
from headrace_dispatch import Exchange, PlainExchange

specification = importlib.util.spec_from_file_location("exchange_world", Path(__file__).with_name("exchange_world.py"))
world = importlib.util.module_from_spec(specification)
specification.loader.exec_module(world)
PLAN = world.PLAN


@pytest.fixture
def needs_gpu():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or shutil.which("nvcc") is None:
        pytest.skip("needs an sm_90 GPU and nvcc; would check that push, wait and pull leave PlainExchange's bytes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the message where there is no GPU")
def test_says_in_one_line_that_there_is_no_gpu():
    with pytest.raises(RuntimeError, match="run on CUDA devices, and torch sees none") as error:
        Exchange(PLAN, 0, [0, 0, 0, 0])
    assert "\n" not in str(error.value)


def test_says_in_one_line_that_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(RuntimeError, match="nvcc and ninja") as error:
        movers.operations.__wrapped__()
    assert "\n" not in str(error.value)


def test_says_in_one_line_that_the_gpu_is_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(RuntimeError, match="sm_90a, not A100"):
        movers.operations.__wrapped__()


def test_sources_lie_in_the_package():
    folder = Path(movers.__file__).parent
    assert all((folder / source).is_file() for source in movers._SOURCES)


class Recorder:
    """Stands in for the compiled operators and writes down the calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, arguments))

    def view(self, address, size):
        return torch.zeros(size, dtype=torch.uint8)


@pytest.fixture
def recorded(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(movers, "operations", lambda plain_loads: recorder)
    return Exchange(PLAN, 1, [10, 20, 30, 40]), recorder.calls


def test_epochs_count_pushes_and_signals(recorded):
    exchange, calls = recorded
    experts, weights = world.choices(1)
    for _ in range(2):
        exchange.dispatch(world.hidden(1), None, experts, weights)
        exchange.combine(experts)
    assert [name for name, _ in calls] == ["push", "wait", "signal", "wait", "pull"] * 2
    epochs = {"push": 9, "wait": 3, "signal": 3}
    assert [arguments[epochs[name]] for name, arguments in calls if name in epochs] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_dispatch_and_combine_have_to_alternate(recorded):
    exchange, _ = recorded
    experts, weights = world.choices(1)
    exchange.dispatch(world.hidden(1), None, experts, weights)
    with pytest.raises(RuntimeError, match="alternate"):
        exchange.dispatch(world.hidden(1), None, experts, weights)


def test_codes_come_with_scales(recorded):
    exchange, _ = recorded
    with pytest.raises(ValueError, match="with scales"):
        exchange.push(world.hidden(1).to(torch.float8_e4m3fn), None, *world.choices(1))


def test_connect_maps_the_other_ranks(monkeypatch):
    recorder = Recorder()
    recorder.allocate = lambda size: 7 if size == PLAN.bytes else None
    recorder.share = lambda address: torch.tensor([address])
    recorder.map = lambda handle: 100 + int(handle)
    monkeypatch.setattr(movers, "operations", lambda plain_loads=False: recorder)
    exchange = movers.connect(PLAN, 2, lambda own: [torch.tensor([0]), torch.tensor([1]), own, torch.tensor([3])])
    assert exchange._peers[0] == [100, 101, 7, 103]
    with pytest.raises(ValueError, match="1 handles"):
        movers.connect(PLAN, 2, lambda own: [own])


@pytest.mark.gpu
@pytest.mark.parametrize("plain_loads", [False, True], ids=["cache hints", "plain loads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_same_bytes_as_the_plain_exchange(needs_gpu, plain_loads, dtype):
    buffers = [torch.zeros(PLAN.bytes, dtype=torch.uint8, device="cuda") for _ in range(4)]
    plain = [PlainExchange(PLAN, rank, [torch.zeros_like(buffer) for buffer in buffers]) for rank in range(4)]
    plain_buffers = plain[0].buffers
    for one in plain:
        one.buffers = plain_buffers
    addresses = [buffer.data_ptr() for buffer in buffers]
    ranks = [Exchange(PLAN, rank, addresses, blocks=3, plain_loads=plain_loads) for rank in range(4)]
    for seed in range(2):  # the second round runs over what the first left behind
        choices = [[tensor.cuda() for tensor in world.choices(rank, seed=seed)] for rank in range(4)]
        for rank, (experts, weights) in enumerate(choices):
            rows = world.hidden(rank).cuda().to(dtype)
            scales = None if dtype == torch.bfloat16 else torch.rand(len(rows), 4, device="cuda")
            ranks[rank].push(rows, scales, experts, weights)
            plain[rank].push(rows, scales, experts, weights)
        received = PLAN.offsets[4]
        for rank in range(4):
            ranks[rank].wait()
            assert torch.equal(buffers[rank][:received], plain_buffers[rank][:received])
            generator = torch.Generator("cuda").manual_seed(rank)
            ranks[rank].results.normal_(generator=generator)
            ranks[rank].result_weights.normal_(generator=generator)
            PLAN.results(plain_buffers[rank]).copy_(ranks[rank].results)
            PLAN.result_weights(plain_buffers[rank]).copy_(ranks[rank].result_weights)
            ranks[rank].signal()
        for rank in range(4):
            ranks[rank].wait()
            for mine, reference in zip(
                ranks[rank].pull(choices[rank][0], fetch_weights=True), plain[rank].pull(choices[rank][0]), strict=True
            ):
                assert torch.equal(mine, reference)
