"""The engine against plain autograd in one process, whatever the layout."""

import pytest

from pipeline_runs import (
    ALPHA,
    MTP,
    configuration,
    distance,
    engine,
    gradients,
    local,
    numerics_of,
    reference,
    reference_step,
    rows,
)
from ranks import run_ranks

HERE = "pipeline/test_engine.py"
LIMIT = {"fp64": 1e-10, "fp32": 1e-5}


def compare(rank, world, compute, **parallel):
    """Rank 0: differences of losses and gradients from one process, and whether the counts are equal."""
    config = configuration(**parallel)
    numerics = numerics_of(compute, config)
    running = engine(config, numerics, rank)
    losses = running.step(local(running, rows(config)), MTP, ALPHA, "step 1")
    found = gradients(running)
    running.close()
    if rank:
        return None
    model = reference(config, numerics)
    expected, counts = reference_step(model, rows(config))
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = [losses.main.item(), losses.mtp.item(), losses.balance.item()]
    off = max(abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True))
    return {"losses": off, "gradients": distance(found, theirs), "counts": losses.counts.tolist() == counts}


@pytest.mark.parametrize("compute", ["fp64", "fp32"])
def test_one_process_equals_plain_autograd(compute):
    found = compare(0, 1, compute)
    assert found["counts"]
    assert found["losses"] < LIMIT[compute]
    assert found["gradients"] < LIMIT[compute]


LAYOUTS = [(pipeline, expert) for pipeline, expert in ((2, 1), (2, 2), (4, 1))]


@pytest.mark.parametrize("node_size", [1, 2])
@pytest.mark.parametrize(("pipeline", "expert"), LAYOUTS)
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"])
def test_every_schedule_and_layout_gives_the_gradients_of_one_process(schedule, pipeline, expert, node_size):
    if expert == 1 and node_size == 2:
        pytest.skip("without experts on other ranks there is nothing to cross nodes")
    layout = {"pipeline": pipeline, "expert": expert, "data": expert, "node_size": node_size, "schedule": schedule}
    found = run_ranks(pipeline * expert, HERE, "compare", compute="fp64", **layout)[0]
    assert found["counts"]
    assert found["losses"] < LIMIT["fp64"]
    assert found["gradients"] < LIMIT["fp64"]
