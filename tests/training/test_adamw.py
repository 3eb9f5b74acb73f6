"""Our use of AdamW against torch.optim.AdamW."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.config.compose import load
from headrace.config.recipe import OptimizerConfig
from headrace.training.adamw import AdamW


@pytest.fixture(scope="module")
def config() -> OptimizerConfig:
    return replace(load([]).recipe.optimizer, name="adamw", beta1=0.9, beta2=0.95, weight_decay=0.1)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=generator, requires_grad=True),
        "norm": torch.randn(5, generator=generator, requires_grad=True),
    }


def gradients(count: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield {"matrix": torch.randn(7, 5, generator=generator), "norm": torch.randn(5, generator=generator)}


def torch_run(rates: list[float]) -> dict[str, Tensor]:
    """The reference: unfused, one tensor at a time."""
    peers = weights()
    optimizer = torch.optim.AdamW(
        [{"params": [peers["matrix"]], "weight_decay": 0.1}, {"params": [peers["norm"]], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
        fused=False,
    )
    for rate, step in zip(rates, gradients(len(rates)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, peer in peers.items():
            peer.grad = step[name]
        optimizer.step()
    return peers


RATES = [1e-2, 3e-2, 1e-3, 5e-3, 2e-2]


@pytest.mark.parametrize(("moments", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_equals_torch_with_changing_rates(config: OptimizerConfig, moments: torch.dtype, tolerance: float) -> None:
    ours, peers = weights(), torch_run(RATES)
    optimizer = AdamW(ours, {"matrix"}, config, moments)
    for rate, step in zip(RATES, gradients(len(RATES)), strict=True):
        for name, parameter in ours.items():
            parameter.grad = step[name]
        optimizer.step(rate)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, peers[name], rtol=0, atol=tolerance)
        moved = (parameter - weights()[name]).abs().max()
        assert moved > 0.02, "nothing was trained"
    assert optimizer.updates == len(RATES)
    assert {state["exp_avg"].dtype for state in optimizer.moments.values()} == {moments}


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_going_on_from_copied_state_is_bitwise_equal(config: OptimizerConfig, moments: torch.dtype) -> None:
    straight = weights()
    optimizer = AdamW(straight, {"matrix"}, config, moments)
    resumed: dict[str, Tensor] = {}
    for index, (rate, step) in enumerate(zip(RATES, gradients(len(RATES)), strict=True)):
        if index == 3:
            resumed = {name: p.detach().clone().requires_grad_() for name, p in straight.items()}
            second = AdamW(resumed, {"matrix"}, config, moments)
            for name, state in optimizer.moments.items():
                for moment, tensor in state.items():
                    second.moments[name][moment].copy_(tensor)
            second.set_updates(optimizer.updates)
        for run, parameters in ((optimizer, straight), *([(second, resumed)] if resumed else [])):
            for name, parameter in parameters.items():
                parameter.grad = step[name]
            run.step(rate)
    for name, parameter in straight.items():
        assert torch.equal(parameter, resumed[name])
