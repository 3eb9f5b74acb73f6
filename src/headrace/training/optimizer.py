"""The optimizer of a run: AdamW for everything, or Muon for matrices and AdamW for the rest.

Who gets what:

    matrices of attention, feed-forward and experts, and the MTP projection   Muon (name=muon), else AdamW with decay
    output head, router                                                       AdamW with decay
    embedding, norms                                                          AdamW without decay

The report states a weight decay of 0.1 and not on what. Norm weights have no direction for decay to shrink, only a
scale that the next matrix undoes. Rows of the embedding are touched by their own token only: decay would wear rare
tokens down between visits (OLMo 2, arXiv 2501.00656, takes it off for stability too). Head and router decay, which
bounds logits and keeps affinities away from the sigmoid's flat ends. Muon leaves head and router alone: their rows
are tokens and experts that stand side by side, not a map between two spaces.

State is named `<parameter name>/<moment>` and shaped like the parameter, so that it does not depend on any layout.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.config.schema import OptimizerConfig, PrecisionConfig
from headrace.errors import UserError
from headrace.training.adamw import AdamW
from headrace.training.muon import Muon

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOMENTUM = "momentum"


class Optimizer:
    """Owns the moments of `parameters` (names as in the model's state_dict, FP32, gradients in `.grad`)."""

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig, precision: PrecisionConfig) -> None:
        moments = _DTYPES[precision.optimizer_moments]
        orthogonal = {n: p for n, p in parameters.items() if config.name == "muon" and takes_muon(n, p)}
        rest = {name: parameter for name, parameter in parameters.items() if name not in orthogonal}
        decayed = {name for name, parameter in rest.items() if takes_decay(name, parameter)}
        self._adamw = AdamW(rest, decayed, config, moments)
        self._muon = Muon(
            orthogonal,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
            compute=_DTYPES[precision.compute],
            moments=moments,
        )

    def step(self, learning_rate: float, muon_learning_rate: float) -> None:
        """Apply one update from the parameters' `.grad`."""
        self._adamw.step(learning_rate)
        self._muon.step(muon_learning_rate)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments themselves, not copies, by `<parameter name>/<moment>`."""
        adamw = {f"{n}/{moment}": t for n, state in self._adamw.moments.items() for moment, t in state.items()}
        return adamw | {f"{name}/{_MOMENTUM}": buffer for name, buffer in self._muon.buffers.items()}

    def state(self) -> dict[str, Any]:
        """What is no tensor, as JSON: the number of updates applied."""
        return {"updates": self._adamw.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self._adamw.set_updates(int(state["updates"]))

    @torch.no_grad()
    def load_state_tensors(self, read: Callable[[str], Tensor], names: list[str], where: str) -> None:
        """Fill the moments from `read(name)`; names or shapes that differ are a `UserError` that says `where`."""
        copy_exactly(self.state_tensors(), read, names, where)


@torch.no_grad()
def copy_exactly(targets: Mapping[str, Tensor], read: Callable[[str], Tensor], names: list[str], where: str) -> None:
    """Copy every tensor of a file into the one of the same name; what is missing, unknown or misshapen is an error."""
    for name in sorted(set(names) ^ set(targets)):
        fault = "has no" if name in targets else "holds an unknown"
        raise UserError(f"{where}: {fault} tensor {name!r}; it was written by another model or optimizer configuration")
    for name, target in targets.items():
        source = read(name)
        if source.shape != target.shape or source.dtype != target.dtype:
            raise UserError(
                f"{where}: tensor {name!r} is {source.dtype} {list(source.shape)}, "
                f"the configuration needs {target.dtype} {list(target.shape)}"
            )
        target.copy_(source)


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Matrices and stacked experts, other than embedding, head and router."""
    return parameter.ndim >= 2 and not _is_embedding(name) and not name.endswith(("lm_head.weight", "mlp.gate.weight"))


def takes_decay(name: str, parameter: Tensor) -> bool:
    """Every matrix except the embedding."""
    return parameter.ndim >= 2 and not _is_embedding(name)


def _is_embedding(name: str) -> bool:
    return name.endswith("embed_tokens.weight")
