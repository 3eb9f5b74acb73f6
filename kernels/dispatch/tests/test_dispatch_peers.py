"""Who sends what where, on plain tensors, against loops over tokens and ranks."""

import importlib.util
from pathlib import Path

import pytest
import torch

from headrace_dispatch import BufferPlan, PlainExchange, combine, lay_out, permute, permute_weights

specification = importlib.util.spec_from_file_location("exchange_world", Path(__file__).with_name("exchange_world.py"))
world = importlib.util.module_from_spec(specification)
specification.loader.exec_module(world)
PLAN, TOKENS = world.PLAN, world.TOKENS


@pytest.fixture
def ranks():
    buffers = [torch.zeros(PLAN.bytes, dtype=torch.uint8) for _ in range(PLAN.ranks)]
    return [PlainExchange(PLAN, rank, buffers) for rank in range(PLAN.ranks)]


def received_by(one, dtype=torch.bfloat16):
    return one.plan.received(one.buffers[one.rank], dtype)


def run_round(ranks):
    """Push, experts, pull: sums and fetched weights of every rank."""
    for rank, one in enumerate(ranks):
        one.push(world.hidden(rank), None, *world.choices(rank))
    for rank, one in enumerate(ranks):
        buffer = one.buffers[rank]
        world.run_experts(rank, received_by(one), PLAN.results(buffer), PLAN.result_weights(buffer))
    return [one.pull(world.choices(rank)[0]) for rank, one in enumerate(ranks)]


def test_regions_follow_one_another():
    plan = BufferPlan(ranks=8, capacity=4096, columns=7168, chosen=8, experts_per_rank=32)
    ends = [begin + size for begin, size in zip(plan.offsets, plan.sizes, strict=True)]
    assert all(begin % 256 == 0 for begin in plan.offsets)
    assert all(end <= begin < end + 256 for end, begin in zip(ends[:-1], plan.offsets[1:], strict=True))
    assert ends[-1] <= plan.bytes
    assert plan.sizes[0] == plan.sizes[4] == 8 * 4096 * 7168 * 2
    assert plan.sizes[1] == 8 * 4096 * 56 * 4
    assert plan.sizes[2] == 8 * 4096 * 8 * 4


def test_destinations():
    experts, _ = world.choices(0)
    experts[3, 2] = -1
    goes = PLAN.destinations(experts).tolist()
    for token, chosen in enumerate(experts.tolist()):
        assert goes[token] == [any(4 * rank <= expert < 4 * rank + 4 for expert in chosen) for rank in range(4)]


def test_a_row_arrives_once_on_each_rank_that_holds_one_of_its_experts(ranks):
    for rank, one in enumerate(ranks):
        one.push(world.hidden(rank), None, *world.choices(rank))
    for rank, one in enumerate(ranks):
        there = received_by(one)
        for source in range(4):
            experts, weights = world.choices(source)
            for token in range(PLAN.capacity):
                slot = source * PLAN.capacity + token
                if token >= TOKENS[source]:
                    assert there.experts[slot].tolist() == [-1] * 4
                    continue
                assert torch.equal(there.experts[slot], experts[token])
                assert torch.equal(there.weights[slot], weights[token])
                meant = any(expert // 4 == rank for expert in experts[token].tolist())
                assert torch.equal(there.rows[slot], world.hidden(source)[token] if meant else torch.zeros(512))


def test_codes_and_scales_arrive(ranks):
    sent = []
    for rank, one in enumerate(ranks):
        codes = world.hidden(rank).to(torch.float8_e4m3fn)
        scales = torch.exp2(torch.arange(4.0 * TOKENS[rank]).view(-1, 4) - rank)
        one.push(codes, scales, *world.choices(rank))
        sent.append((codes.view(torch.uint8), scales))
    for rank, one in enumerate(ranks):
        there = received_by(one, torch.float8_e4m3fn)
        for source, (codes, scales) in enumerate(sent):
            goes = PLAN.destinations(world.choices(source)[0])[:, rank]
            mine = PLAN.slots(source, TOKENS[source])
            assert torch.equal(there.rows.view(torch.uint8)[mine][goes], codes[goes])
            assert torch.equal(there.scales[mine][goes], scales[goes])


def test_results_are_summed_in_the_order_of_the_ranks(ranks):
    for source, (sums, fetched) in enumerate(run_round(ranks)):
        experts, weights = world.choices(source)
        for token, chosen in enumerate(experts.tolist()):
            x = world.hidden(source)[token].float()
            total = torch.zeros(512)
            for rank in range(4):
                part = torch.zeros(512)
                for expert, weight in zip(chosen, weights[token].tolist(), strict=True):
                    if expert // 4 == rank:
                        part += x * (expert + 1) * weight
                total += part.bfloat16().float()
            assert torch.equal(sums[token], total.bfloat16())
            expected = [1000 * expert + weight for expert, weight in zip(chosen, weights[token].tolist(), strict=True)]
            assert fetched[token].tolist() == torch.tensor(expected).tolist()


def test_slots_of_an_earlier_round_are_forgotten(ranks):
    run_round(ranks)
    ranks[0].push(world.hidden(0, 2), None, *world.choices(0, 2))
    for one in ranks:
        assert (received_by(one).experts[2 : PLAN.capacity] == -1).all()


def test_the_whole_way_through_the_kernels(ranks, device):
    """Four ranks with permute and combine in between against every token's sum over its experts in float64."""
    if device == "cuda":
        pytest.skip("shows the plain exchange around the Triton kernels; on CUDA test_dispatch_movers does")
    for rank, one in enumerate(ranks):
        one.push(world.hidden(rank), None, *world.choices(rank))
    for rank, one in enumerate(ranks):
        there = received_by(one)
        layout = lay_out(there.experts, PLAN.experts_per_rank, first=4 * rank)
        expert = (4 * rank + layout.group_of_block.repeat_interleave(128) + 1)[:, None]
        rows = permute(there.rows.nan_to_num(0.0), layout)
        y = (rows.float() * expert * permute_weights(there.weights, layout)[:, None]).bfloat16()
        combine(y, layout, out=PLAN.results(one.buffers[rank]))
    for source, one in enumerate(ranks):
        experts, weights = world.choices(source)
        exact = world.hidden(source).double() * ((experts + 1) * weights.double()).sum(dim=1, keepdim=True)
        sums, _ = one.pull(experts)
        assert ((sums.double() - exact).abs() <= 2.0**-6 * exact.abs()).all()  # three roundings to BF16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 9}, "between 1 and 8"),
        ({"columns": 640}, "multiples of 512"),
        ({"chosen": 20}, "20 of 16 experts"),
        ({"capacity": 0}, "0 tokens"),
    ],
)
def test_refuses_impossible_plans(change, message):
    shape = {"ranks": 4, "capacity": 12, "columns": 512, "chosen": 4, "experts_per_rank": 4}
    with pytest.raises(ValueError, match=message):
        BufferPlan(**(shape | change))


def test_refuses_more_tokens_than_planned(ranks):
    with pytest.raises(ValueError, match="planned for 12"):
        ranks[0].push(world.hidden(0, 13), None, *world.choices(0, 13))
