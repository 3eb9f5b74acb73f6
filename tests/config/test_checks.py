"""Layouts that cannot run are refused in words, and exactly those; the pipeline's own code is the judge."""

from dataclasses import replace

import pytest

from headrace.config.checks import problems
from headrace.config.compose import load
from headrace.errors import UserError
from headrace.pipeline.engine import microbatches_of, schedule_of
from headrace.pipeline.generators import generate

SCHEDULES = ["1f1b", "interleaved_1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"]


@pytest.fixture(scope="module")
def tiny():
    return load(["experiment=tiny"])


def with_layout(config, sequences=8, **parallel):
    recipe = replace(config.recipe, batch_sequences=sequences)
    return replace(config, recipe=recipe, parallel=replace(config.parallel, **parallel))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_refused_exactly_where_it_does_not_exist(tiny, name):
    for ranks in range(1, 7):
        for microbatches in range(1, 20):
            config = with_layout(tiny, microbatches, pipeline=ranks, schedule=name, microbatch=1)
            try:
                generate(name, ranks, microbatches)
            except UserError:
                assert len(problems(config)) == 1, (ranks, microbatches)
            else:
                assert problems(config) == [], (ranks, microbatches)


@pytest.mark.parametrize("name", [*SCHEDULES, "auto"])
def test_layers_are_given_per_stage_of_the_schedule(tiny, name):
    picked, _ = schedule_of(with_layout(tiny, pipeline=2, schedule=name, microbatch=1))
    stages = generate(picked, 2, 8).stages
    for given in range(1, 6):
        layers = (tiny.model.num_hidden_layers, *[0] * (given - 1))
        config = with_layout(tiny, pipeline=2, schedule=name, microbatch=1, layers=layers)
        assert (problems(config) == []) == (given == stages)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"data": 3}, "parallel.data=3 must divide recipe.batch_sequences=8"),
        ({"data": 2, "microbatch": 8}, "parallel.microbatch=8 must divide the 4 rows"),
        ({"data": 2, "expert": 4}, "parallel.expert=4 must divide parallel.data=2"),
        ({"data": 3, "expert": 3}, "parallel.expert=3 must divide model.n_routed_experts=8"),
        ({"data": 8, "expert": 8}, "spans 8 nodes of parallel.node_size=1, which must divide model.n_group=4"),
        ({"data": 2, "expert": 2, "node_size": 3}, "one of parallel.expert=2 and parallel.node_size=3"),
        ({"layers": (1, 1)}, "parallel.layers has 2 numbers"),
        ({"layers": (1,)}, "parallel.layers sums to 1, not to model.num_hidden_layers=2"),
        ({"pipeline": 2, "schedule": "dualpipe", "microbatch": 4}, "make 2 of them"),
    ],
)
def test_what_is_wrong_is_named(tiny, parallel, words):
    assert words in "\n".join(problems(with_layout(tiny, **parallel)))


@pytest.mark.parametrize(
    "parallel",
    [
        {"data": 4, "expert": 4, "node_size": 2},
        {"data": 4, "expert": 2, "node_size": 8},
        {"data": 8, "expert": 8, "node_size": 2, "microbatch": 1},
        {"pipeline": 3, "schedule": "auto", "microbatch": 2},
    ],
)
def test_what_can_run_is_not_refused(tiny, parallel):
    assert problems(with_layout(tiny, **parallel)) == []


def test_a_token_cannot_travel_with_the_scale_of_a_whole_tensor():
    words = ["experiment=tiny", "precision=fp8", "precision.fp8.activation_tile=tensor"]
    config = load([*words, "precision.fp8.backend=reference"])
    assert problems(config) == []
    wrong = problems(with_layout(config, data=2, expert=2))
    assert [line.split()[0] for line in wrong] == ["precision.fp8.activation_tile=tensor"]


def test_the_published_layout_and_the_demo_on_two_ranks_compose():
    published = load(["model=v3_671b", "recipe=v3_671b", "parallel=v3"])
    assert (microbatches_of(published), schedule_of(published)[0]) == (120, "dualpipe")
    for experiment in ("demo", "tiny"):
        config = load([f"experiment={experiment}", "parallel=dualpipe"])
        assert (microbatches_of(config), schedule_of(config)[0]) == (8, "dualpipe")
