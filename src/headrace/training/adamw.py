"""AdamW (arXiv 1711.05101): torch's fused one for FP32 moments, and a plain one that keeps its moments in BF16.

DeepSeek-V3 keeps the moments in BF16 without harm (report, section 3.3.3), which saves 4 bytes per parameter; torch's
fused kernel wants them in the parameter's dtype. The plain one computes in FP32 and rounds what it stores. The update
itself uses the unrounded values.

Moments exist from construction on, so that a checkpoint always has all of them, and one number counts the updates.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.config.recipe import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW over named parameters; those named in `decayed` also get decoupled weight decay."""

    def __init__(
        self, parameters: Mapping[str, Tensor], decayed: set[str], config: OptimizerConfig, moments: torch.dtype
    ) -> None:
        self._parameters, self._decayed, self._config = dict(parameters), decayed, config
        self.updates = 0
        self.moments = {
            name: {moment: torch.zeros_like(parameter, dtype=moments, requires_grad=False) for moment in MOMENTS}
            for name, parameter in parameters.items()
        }
        self._fused = self._build_fused() if moments == torch.float32 and parameters else None

    def step(self, learning_rate: float) -> None:
        """Apply one update from the parameters' gradients at `learning_rate`; no gradient, no update."""
        self.updates += 1
        if self._fused is None:
            self._step_rounded(learning_rate)
            return
        for group in self._fused.param_groups:
            group["lr"] = learning_rate
        self._fused.step()
        # Fused AdamW does not count as a change of the parameters (torch 2.13), so their BF16 copies would stay old.
        torch.autograd.graph.increment_version([p for p in self._parameters.values() if p.grad is not None])

    def set_updates(self, updates: int) -> None:
        """Go on counting from `updates` (the bias correction depends on it)."""
        self.updates = updates
        if self._fused is not None:
            for state in self._fused.state.values():
                state["step"].fill_(updates)

    def _build_fused(self) -> torch.optim.AdamW:
        config = self._config
        groups = [
            {
                "params": [p for name, p in self._parameters.items() if (name in self._decayed) == decays],
                "weight_decay": w,
            }
            for decays, w in ((True, config.weight_decay), (False, 0.0))
        ]
        fused = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for name, parameter in self._parameters.items():
            fused.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **self.moments[name],
            }
        return fused

    @torch.no_grad()
    def _step_rounded(self, learning_rate: float) -> None:
        config = self._config
        bias1, bias2 = 1 - config.beta1**self.updates, 1 - config.beta2**self.updates
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            first, second = self.moments[name]["exp_avg"], self.moments[name]["exp_avg_sq"]
            mean = first.float().lerp(gradient, 1 - config.beta1)
            square = second.float().mul(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
            first.copy_(mean)
            second.copy_(square)
            if name in self._decayed:
                parameter.mul_(1 - learning_rate * config.weight_decay)
            parameter.addcdiv_(mean, (square / bias2).sqrt_().add_(config.eps), value=-learning_rate / bias1)
