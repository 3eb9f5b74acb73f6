"""Alarms of the routers: when they come, and that they come once."""

import pytest
import torch

from headrace.training.router_alarms import RouterAlarms
from pipeline_runs import BIAS_SPEED, configuration, engine, numerics_of

EVEN, DEAD, COLLAPSED = [4, 4, 4, 4], [8, 8, 0, 0], [16, 0, 0, 0]


def _told(counts, layers=("3",), chosen=1):
    """(step, sentence) over steps with these counts of each layer; three steps in a row make an alarm."""
    alarms = RouterAlarms(layers, chosen, patience=3)
    return [(step, said) for step, load in enumerate(counts, start=1) for said in alarms.after_step(load)]


def test_an_expert_without_tokens_is_named_once():
    assert _told([[DEAD]] * 6) == [(3, "layer 3: no token for 3 steps at experts 2, 3")]
    assert _told([[EVEN]] * 6) == []


def test_steps_are_counted_in_a_row_and_an_alarm_may_come_again():
    assert _told([[DEAD], [DEAD], [EVEN], [DEAD], [DEAD]]) == []
    assert [step for step, _ in _told([[DEAD]] * 3 + [[EVEN]] + [[DEAD]] * 3)] == [3, 7]


def test_a_layer_whose_tokens_all_choose_the_same_experts_is_named():
    told = _told([[EVEN, COLLAPSED]] * 4, layers=("1", "2"))
    assert [step for step, _ in told] == [3, 3]
    assert told[0][1] == "layer 2: no token for 3 steps at experts 1, 2, 3"
    assert told[1][1].startswith("layer 2: MaxVio at or above 2.25 for 3 steps, 3 now")
    assert "MaxVio" not in str(_told([[[12, 2, 1, 1]]] * 4))  # MaxVio 2


def test_where_every_token_goes_to_every_expert_nothing_is_wrong():
    assert _told([[EVEN]] * 5, chosen=4) == []


def test_many_experts_are_not_all_listed():
    (_, said), *_ = _told([[[20, *[0] * 19]]] * 3)
    assert said.endswith("1, 2, 3, 4, 5, 6, 7, 8 and 11 more")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_selection_biases_stay_in_fp32(precision):
    """In BF16 a bias of 0.5 could not move by 0.001."""
    config = configuration(precision)
    running = engine(config, numerics_of(precision, config))
    biases = [buffer for stage in running.stages.values() for _, buffer in stage.named_buffers()]
    counts = torch.ones(len(biases), config.model.n_routed_experts, dtype=torch.int64)
    counts[:, 0] = 9
    for bias in biases:
        bias.fill_(0.5)
    running.update_router_bias(counts, BIAS_SPEED)
    assert all(bias.dtype == torch.float32 and bias[0] < 0.5 < bias[1] for bias in biases)
