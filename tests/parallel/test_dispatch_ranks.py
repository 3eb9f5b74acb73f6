"""Experts on several ranks against one process that holds them all and sees every rank's tokens."""

import dataclasses
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.fp8.activations import Activation
from headrace.fp8.gemms import PlainGemms
from headrace.fp8.numerics import Numerics
from headrace.fp8.quantise import ROW_TILE, quantise
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model.dispatch import LocalDispatcher
from headrace.model.experts import MoeFeedForward
from headrace.model.router import Router, Routing
from headrace.parallel.dispatch import ExpertParallelDispatcher, make_dispatcher
from headrace.parallel.mesh import Groups, Mesh
from ranks import run_ranks

pytestmark = pytest.mark.alone

WIDTH, EXPERTS = 136, 8  # more than one tile of 128, and no multiple
CASES = {
    2: [("fp64", 1, 2), ("fp64", 2, 2), ("fp8", 1, 2)],
    4: [
        *[("fp64", node, 4) for node in (1, 2, 4)],
        ("fp32", 2, 4),
        ("bf16", 2, 4),
        ("fp8", 2, 4),
        ("fp8 bf16", 2, 4),
        ("fp64", 1, 2),  # two expert groups side by side
        ("fp64", 4, 2),  # both in one node
    ],
}
ROUTINGS = ["usual", "few experts", "one rank without tokens"]
TINY = load(["experiment=tiny", "precision=fp8"])
PARALLEL, FP8 = TINY.parallel, dataclasses.replace(TINY.precision.fp8, backend="reference")


def model_config():
    return dataclasses.replace(
        TINY.model, hidden_size=WIDTH, moe_intermediate_size=32, n_routed_experts=EXPERTS, n_group=4, topk_group=2,
        num_experts_per_tok=3,
    )  # fmt: skip


def numerics_of(name):
    return Numerics({"fp8": "fp32", "fp8 bf16": "bf16"}.get(name, name), FP8 if name.startswith("fp8") else None)


def group_data(ranks, routing, dtype, config):
    """Tokens, gradients of results, and routing of every rank of a group, from one seed."""
    torch.manual_seed(1)
    tokens = [0 if routing == "one rank without tokens" and rank == 1 else 13 + 4 * rank for rank in range(ranks)]
    total = sum(tokens)
    x, dy = torch.randn(total, WIDTH).to(dtype), torch.randn(total, WIDTH).to(dtype)
    scores = torch.rand(total, EXPERTS)
    if routing == "few experts":
        scores[:, EXPERTS // 2 :] = 0  # whole ranks get nothing
        scores[:, 1] = 0
    experts = Router(config).select(scores)
    weights = torch.rand(total, config.num_experts_per_tok).to(torch.promote_types(dtype, torch.float32))
    return tokens, x, dy, experts, weights


def layer_of(config, numerics, dispatcher):
    layer = MoeFeedForward(config, numerics, WeightGradientStore(), dispatcher)
    return layer.double() if numerics.compute == "fp64" else layer


def result(layer, x, dy, experts, weights):
    """Output, gradients of tokens and routing weights, of the experts, and of the shared experts."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    routing = Routing(experts, weights, torch.empty(0), torch.bincount(experts.flatten(), minlength=EXPERTS))
    y = layer(Activation(x), routing)
    y.backward(dy)
    parts = layer.experts, layer.shared_experts
    own, shared = ([p.grad for p in part.parameters()] for part in parts)
    return {"y": [y.detach()], "dx": [x.grad], "dw": [weights.grad], "experts": own, "shared": shared}


def one_case(mesh, groups, name, routing, config):
    numerics = numerics_of(name)
    dispatcher = make_dispatcher(mesh, groups, numerics.linear, PARALLEL)
    dtype = {"fp64": torch.float64}.get(numerics.compute, numerics.dtype)
    tokens, *data = group_data(mesh.expert, routing, dtype, config)
    here = slice(sum(tokens[: mesh.expert_rank]), sum(tokens[: mesh.expert_rank + 1]))
    local = dispatcher.local_experts(EXPERTS)

    whole, part = layer_of(config, numerics, LocalDispatcher(numerics.linear)), layer_of(config, numerics, dispatcher)
    torch.manual_seed(2)
    with torch.no_grad():
        for full in whole.parameters():
            full.normal_(std=0.1)
        for full, own in zip(whole.parameters(), part.parameters(), strict=True):
            own.copy_(full[local.start : local.stop] if full.dim() == 3 else full)
    expected = result(whole, *data)
    ours = result(part, *(value[here] for value in data))
    again = result(layer_copy(part, config, numerics, dispatcher), *(value[here] for value in data))
    repeated = all(torch.equal(a, b) for key in ours for a, b in zip(ours[key], again[key], strict=True))
    for gradient in ours["shared"]:
        if mesh.expert > 1:
            distributed.all_reduce(gradient, group=groups.get("test", mesh.expert_group()))
    expected |= {key: [value[here] for value in expected[key]] for key in ("y", "dx", "dw")}
    expected["experts"] = [value[local.start : local.stop] for value in expected["experts"]]
    errors = {
        key: max(
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            for a, b in zip(ours[key], expected[key], strict=True)
        )
        for key in ours
    }
    same = {key: all(torch.equal(a, b) for a, b in zip(ours[key], expected[key], strict=True)) for key in ours}
    traffic = counted(dispatcher, mesh, [value[here] for value in data], data[2], tokens)
    return {"errors": errors, "same": same, "repeated": repeated, **traffic}


def layer_copy(layer, config, numerics, dispatcher):
    copy = layer_of(config, numerics, dispatcher)
    copy.load_state_dict(layer.state_dict())
    return copy


def counted(dispatcher, mesh, here, all_experts, tokens):
    """Rows sent across nodes and inside them, rows of experts, beside what the routing says."""
    x, _, experts, weights = here
    routing = Routing(experts, weights, torch.empty(0), torch.bincount(experts.flatten(), minlength=EXPERTS))
    received = dispatcher.send(x, routing)
    near, share = min(mesh.node_size, mesh.expert), EXPERTS // mesh.expert
    homes = [home for home, count in enumerate(tokens) for _ in range(count)]
    ranks = [{e // share for e in chosen} for chosen in all_experts.tolist()]
    nodes = [{rank // near for rank in chosen} for chosen in ranks]
    mine = [n for n, home in enumerate(homes) if home == mesh.expert_rank]
    expected_across = [sum(node in nodes[n] for n in mine) for node in range(mesh.expert // near)]
    node, place = divmod(mesh.expert_rank, near)
    passing = [n for n, home in enumerate(homes) if home % near == place and node in nodes[n]]
    expected_inside = [sum(node * near + peer in ranks[n] for n in passing) for peer in range(near)]
    sent = [crossing.sent for crossing in received.way.crossings]
    multiple = dispatcher._gemms.row_multiple
    counts = torch.bincount(all_experts.flatten(), minlength=EXPERTS).tolist()
    filled = [-(-counts[e] // multiple) * multiple for e in dispatcher.local_experts(EXPERTS)]
    return {
        "sent": sent,
        "expected": [hop for hop in (expected_across, expected_inside) if len(hop) > 1],
        "counts": [received.counts, filled],
        "most nodes": max((len(nodes[n]) for n in mine), default=0),
        "rows": [int((received.weights_S != 0).sum()), sum(counts[e] for e in dispatcher.local_experts(EXPERTS))],
    }


def every_case(rank, world):
    config, results = model_config(), {}
    for name, node_size, expert in CASES[world]:
        mesh = Mesh(1, world, expert, node_size, rank)
        groups = Groups(mesh, timedelta(seconds=30))
        groups.open("test", [tuple(range(first, first + expert)) for first in range(0, world, expert)])
        for routing in ROUTINGS:
            results[f"{name}, nodes of {node_size}, EP {expert}, {routing}"] = one_case(
                mesh, groups, name, routing, config
            )
    return results, bf16_then_quantised(rank, world)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return run_ranks(request.param, "parallel/test_dispatch_ranks.py", "every_case", seconds=180)


@pytest.fixture
def found(ranks):
    return [(case, result) for results, _ in ranks for case, result in results.items()]


# In FP8 the shared experts' weight gradients are quantised in tiles of 128 tokens, which a rank's share cuts elsewhere.
TOLERANCES = {"fp64": 1e-12, "fp32": 1e-6, "bf16": 1e-2, "fp8": 1e-5, "fp8 bf16": 1e-2}


def test_results_and_gradients_are_those_of_one_process(found):
    wrong = [
        (case, key, error)
        for case, result in found
        for key, error in result["errors"].items()
        if not error <= TOLERANCES[case.split(",")[0]]
    ]
    assert wrong == []


def test_experts_see_the_same_matrices_so_their_gradients_are_the_same_bits(found):
    assert [case for case, result in found if not result["same"]["experts"]] == []


def test_the_same_happens_every_time(found):
    assert [case for case, result in found if not result["repeated"]] == []


def test_a_token_is_sent_once_to_each_of_its_nodes_and_ranks_and_none_is_dropped(found):
    for case, result in found:
        assert result["sent"] == result["expected"], case
        assert result["most nodes"] <= 2, case  # topk_group, also with four nodes
        assert result["counts"][0] == result["counts"][1], case
        assert result["rows"][0] == result["rows"][1], case


def bf16_then_quantised(rank, world):
    """Whether rows and gradients sent as FP8 are the bytes of those sent as BF16 and quantised."""
    mesh, config, fp8 = Mesh(1, world, world, 1, rank), model_config(), numerics_of("fp8 bf16").linear
    plain = PlainGemms("bf16")
    plain.row_multiple = fp8.row_multiple
    tokens, x, dy, experts, weights = group_data(world, "usual", torch.bfloat16, config)
    here = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    routing = Routing(
        experts[here], weights[here], torch.empty(0), torch.bincount(experts[here].flatten(), minlength=EXPERTS)
    )
    dispatchers = [make_dispatcher(mesh, Groups(mesh, timedelta(seconds=30)), g, PARALLEL) for g in (fp8, plain)]
    arrived = [dispatcher.send(x[here], routing) for dispatcher in dispatchers]
    gradients = [d.send_gradient(dy[here], rows) for d, rows in zip(dispatchers, arrived, strict=True)]
    assert not torch.equal(*gradients)
    operands = [fp8.gradient(gradient, "swiglu")[0] for gradient in gradients]
    used = arrived[0].weights_S > 0
    sent, after = arrived[0].operand.quantised, quantise(arrived[1].operand, ROW_TILE, power_of_two=True)
    pairs = [(sent.codes.view(torch.uint8), after.codes.view(torch.uint8)), (sent.scales, after.scales), operands]
    assert torch.equal(arrived[0].weights_S, arrived[1].weights_S)
    return [int(used.sum()), *(bool(torch.equal(a[used], b[used])) for a, b in pairs)]


def test_fp8_payload_equals_quantising_after_a_bf16_dispatch(ranks):
    results = [result for _, result in ranks]
    assert sum(rows for rows, *_ in results) == 3 * sum(13 + 4 * rank for rank in range(len(ranks)))
    assert all(codes and scales and gradients for _, codes, scales, gradients in results)


def test_mistakes_of_the_user_are_named():
    def make(expert, node_size, **changes):
        config = dataclasses.replace(PARALLEL, expert=expert, data=expert, node_size=node_size, **changes)
        return make_dispatcher(Mesh.of(config, 0), SimpleNamespace(), PlainGemms("fp32"), config)

    with pytest.raises(UserError, match=r"parallel.dispatch=deepep: .*deep_ep"):
        make(4, 2, dispatch="deepep")
    with pytest.raises(UserError, match=r"parallel.expert=4 .*parallel.node_size=3"):
        make(4, 3)
    with pytest.raises(UserError, match=r"parallel.expert=3 must divide model.n_routed_experts=8"):
        ExpertParallelDispatcher(PlainGemms("fp32"), [], 3, 0).local_experts(8)
    assert isinstance(make(1, 1), LocalDispatcher)
