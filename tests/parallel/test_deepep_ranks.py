"""Dispatch through DeepEP against dispatch by all-to-all, to the bit; DeepEP is a stand-in (stand_ins/deep_ep)."""

import dataclasses
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from torch import distributed

from headrace.errors import UserError
from headrace.fp8.gemms import PlainGemms
from headrace.model.dispatch import LocalDispatcher
from headrace.model.router import Routing
from headrace.parallel.deepep import DeepEpDispatcher
from headrace.parallel.dispatch import make_dispatcher
from headrace.parallel.experts import Sums
from headrace.parallel.mesh import Groups, Mesh
from parallel.test_dispatch_ranks import (
    EXPERTS,
    PARALLEL,
    ROUTINGS,
    group_data,
    layer_copy,
    layer_of,
    model_config,
    numerics_of,
    result,
)
from ranks import run_ranks

pytestmark = pytest.mark.alone

STAND_INS = str(Path(__file__).resolve().parents[1] / "stand_ins")
FORMATS = ["bf16", "fp8 bf16"]
CASES = {  # node_size, ranks of a node in DeepEP, parallel.expert
    2: [(1, 8, 2), (2, 8, 2)],
    4: [(4, 8, 4), (1, 8, 4), (2, 2, 4), (1, 8, 2)],
}


def to_even(sums, values):
    """`Sums`, with ties rounded to even as GPUs and DeepEP do; torch's BF16 `embedding_bag` on a CPU rounds them up."""
    bags = torch.nn.functional.embedding_bag(sums.rows, values.float(), sums.starts_N, mode="sum")
    return bags.to(values.dtype)


def every_case(rank, world, device="cpu"):
    if device == "cpu":
        sys.path.insert(0, STAND_INS)
    import deep_ep

    found = {}
    for node_size, node, expert in CASES[world] if device == "cpu" else [(world, 8, world)]:
        mesh = Mesh(1, world, expert, node_size, rank)
        with (
            patch.object(Sums, "__call__", to_even if device == "cpu" else Sums.__call__),
            patch.object(deep_ep.Buffer, "node", node, create=True),
            patch("torch.cuda.is_available", lambda: True),
        ):
            for name in FORMATS:
                for routing in ROUTINGS:
                    case = f"{name}, nodes of {node_size}, EP {expert}, {routing}"
                    found[case] = one_case(mesh, name, routing, device)
    return found


def one_case(mesh, name, routing, device):
    numerics = numerics_of(name)
    config = dataclasses.replace(
        model_config(), topk_group=3, num_experts_per_tok=4
    )  # two ranks of a node, and another
    both = [
        make_dispatcher(
            mesh, Groups(mesh, timedelta(seconds=30)), numerics.linear, dataclasses.replace(PARALLEL, dispatch=dispatch)
        )
        for dispatch in ("all_to_all", "deepep")
    ]
    tokens, *data = group_data(mesh.expert, routing, torch.bfloat16, config)
    here = slice(sum(tokens[: mesh.expert_rank]), sum(tokens[: mesh.expert_rank + 1]))
    x, dy, experts, weights = (value[here].to(device) for value in data)
    torch.manual_seed(3 + mesh.rank)
    expected, ours = (steps(dispatcher, numerics.linear, x, dy, experts, weights) for dispatcher in both)
    same = {key: all(torch.equal(a, b) for a, b in zip(ours[key], expected[key], strict=True)) for key in ours}

    torch.manual_seed(2)
    layer = layer_of(config, numerics, both[0]).to(device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1)
    layers = layer, layer_copy(layer, config, numerics, both[1]).to(device)
    trained = [result(each, x, dy, experts, weights) for each in layers]
    same |= {
        f"layer {key}": all(torch.equal(a, b) for a, b in zip(trained[0][key], trained[1][key], strict=True))
        for key in trained[0]
    }
    return {"same": same, "backends": [each.backend for each in both], "calls": getattr(both[1]._buffer, "calls", None)}


def steps(dispatcher, gemms, x, dy, experts, weights):
    """What each of the four methods gives, without rows that only fill up."""
    routing = Routing(experts, weights, torch.empty(0), torch.bincount(experts.flatten(), minlength=EXPERTS))
    received = dispatcher.send(x, routing)
    used = received.weights_S != 0
    packed = gemms.pack(received.operand)
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(received.rows, x.shape[1], generator=generator).to(x) * used[:, None]
    dweights = torch.rand(received.rows, generator=generator).to(weights)
    return {
        "send": [packed[used], received.weights_S, torch.tensor(received.counts)],
        "collect": [dispatcher.collect(rows, received)],
        "send_gradient": [dispatcher.send_gradient(dy, received)],
        "collect_gradient": [*dispatcher.collect_gradient(rows, dweights, received)],
        "collect again": [dispatcher.collect(2 * rows, received)],
    }


@pytest.mark.parametrize("world", CASES)
def test_all_that_is_sent_and_summed_is_the_same_to_the_bit(world):
    ranks = run_ranks(world, "parallel/test_deepep_ranks.py", "every_case", seconds=180)
    for found in ranks:
        assert len(found) == len(CASES[world]) * len(FORMATS) * len(ROUTINGS)
        wrong = [(case, key) for case, each in found.items() for key, same in each["same"].items() if not same]
        assert wrong == []
        for each in found.values():
            assert each["backends"] == ["all_to_all", "deepep 1.2.1"]
            once = ["dispatch", "combine", "dispatch again", "combine"]
            assert each["calls"] == [*once, "combine", *once]  # the way of the forward is used again, and no other


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or find_spec("deep_ep") is None,
    reason="would hold the real DeepEP on two GPUs to the same bits as all_to_all; needs both, and deep_ep",
)
def test_so_it_is_with_the_real_package(tmp_path):
    ranks = run_ranks(2, "parallel/test_deepep_ranks.py", "on_gpus", seconds=300, store=str(tmp_path / "store"))
    assert [case for found in ranks for case, each in found.items() if not all(each["same"].values())] == []


def on_gpus(rank, world, store):
    torch.cuda.set_device(rank)
    distributed.destroy_process_group()
    distributed.init_process_group("nccl", store=distributed.FileStore(store, world), rank=rank, world_size=world)
    return every_case(rank, world, f"cuda:{rank}")


@patch.dict(sys.modules)  # in which the stand-in must not stay
def test_what_cannot_run_is_refused_in_one_line(monkeypatch):
    def make(expert=2, compute="bf16"):
        config = dataclasses.replace(PARALLEL, expert=expert, data=expert, node_size=expert, dispatch="deepep")
        return make_dispatcher(Mesh.of(config, 0), groups_of(expert), PlainGemms(compute), config)

    def groups_of(expert):
        group = SimpleNamespace(size=lambda: expert)
        return SimpleNamespace(open=lambda *_: None, get=lambda *_: group)

    with pytest.raises(UserError, match=r"^parallel.dispatch=deepep: .* deep_ep is not installed; use all_to_all$"):
        make()
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"^parallel.dispatch=deepep: runs on GPUs only"):
        make()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert isinstance(make(), DeepEpDispatcher)
    assert isinstance(make(1), LocalDispatcher)
    with pytest.raises(UserError, match=r"^parallel.dispatch=deepep sums in BF16 only"):
        make(compute="fp32")
    with pytest.raises(
        UserError, match=r"^parallel.dispatch=deepep: DeepEP 1.2.1 has no settings for parallel.expert=3"
    ):
        make(3)
    with pytest.raises(UserError, match=r"parallel.expert=2 must divide model.n_routed_experts=7"):
        make().local_experts(7)
    monkeypatch.setattr("headrace.parallel.deepep.import_module", Mock(side_effect=ImportError("no CUDA 12")))
    with pytest.raises(UserError, match=r"^parallel.dispatch=deepep: .* deep_ep does not load \(no CUDA 12\)"):
        make()
