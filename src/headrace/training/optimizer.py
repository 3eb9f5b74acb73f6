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

The optimizer works on pieces (`parallel.shards`): whole parameters in a single process, else the runs of elements that
this rank owns (ZeRO-1). What a parameter gets depends on its name and whole shape, never on the cut. The state of a
piece is named `<parameter name>/<moment>`: put together it is shaped like the parameter and independent of any layout.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from headrace.config.recipe import OptimizerConfig
from headrace.config.schema import PrecisionConfig
from headrace.parallel.shards import Piece
from headrace.training.adamw import AdamW
from headrace.training.muon import Muon

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MOMENTUM = "momentum"


class Optimizer:
    """Owns the moments of `pieces` (names as in the model's state_dict, FP32, gradients in `.grad`)."""

    def __init__(self, pieces: Iterable[Piece], config: OptimizerConfig, precision: PrecisionConfig) -> None:
        moments = _DTYPES[precision.optimizer_moments]
        self._pieces = {piece.name: piece for piece in pieces}
        tensors = {name: piece.tensor for name, piece in self._pieces.items()}
        shapes = {name: piece.shape for name, piece in self._pieces.items()}
        orthogonal = {name: t for name, t in tensors.items() if stays_whole(config, name, shapes[name])}
        rest = {name: tensor for name, tensor in tensors.items() if name not in orthogonal}
        decayed = {name for name in rest if takes_decay(name, shapes[name])}
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

    def moments(self) -> list[Piece]:
        """The moments themselves, not copies, as pieces `<parameter name>/<moment>`."""
        adamw = [(n, moment, t) for n, state in self._adamw.moments.items() for moment, t in state.items()]
        muon = [(name, _MOMENTUM, buffer) for name, buffer in self._muon.buffers.items()]
        return [self._pieces[name].of(f"{name}/{moment}", tensor) for name, moment, tensor in (*adamw, *muon)]

    def reset(self) -> None:
        """Forget all updates."""
        for piece in self.moments():
            piece.tensor.zero_()
        self._adamw.set_updates(0)

    def state(self) -> dict[str, Any]:
        """What is no tensor, as JSON: the number of updates applied."""
        return {"updates": self._adamw.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self._adamw.set_updates(int(state["updates"]))


def stays_whole(config: OptimizerConfig, name: str, shape: Sequence[int]) -> bool:
    """Whether the matrices of a parameter of the whole `shape` must not be cut."""
    return config.name == "muon" and takes_muon(name, shape)


def takes_muon(name: str, shape: Sequence[int]) -> bool:
    """Matrices and stacked experts, other than embedding, head and router."""
    return len(shape) >= 2 and not _is_embedding(name) and not name.endswith(("lm_head.weight", "mlp.gate.weight"))


def takes_decay(name: str, shape: Sequence[int]) -> bool:
    """Every matrix except the embedding."""
    return len(shape) >= 2 and not _is_embedding(name)


def _is_embedding(name: str) -> bool:
    return name.endswith("embed_tokens.weight")
