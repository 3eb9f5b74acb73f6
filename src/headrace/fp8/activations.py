"""What a linear layer's input is on its way through forward and backward: quantised once, kept small, restored once.

Several layers read one input (gate and up projection; the two down projections of MLA). `Input` quantises it once for
all of them and says what autograd is to keep; in the backward pass the first of them makes the operand of the weight
gradients and the last one drops it. An `Activation` may carry a recipe to compute it again (`Again`: the output of a
norm from its input); then nothing of its own is kept. Such values are the same bits, so this changes memory
and time and nothing else. (SwiGLU's output is another matter: computed again from inputs that are kept in E4M3.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.fp8.gemms import Gemms, Role


@dataclass(frozen=True)
class Again:
    """How to compute an activation again: `function(*tensors)`; the tensors are kept anyway."""

    tensors: tuple[Tensor, ...]
    function: Callable[..., Tensor]


@dataclass(frozen=True)
class Activation:
    """Hidden states of any shape [..., D] and, where they are not worth keeping, how to compute them again."""

    value: Tensor
    again: Again | None = None

    @staticmethod
    def of(given: "Tensor | Activation") -> "Activation":
        """A tensor as an activation that has to be kept."""
        return given if isinstance(given, Activation) else Activation(given)

    def flatten(self) -> "Activation":
        """[S, D]."""
        return Activation(self.value.reshape(-1, self.value.shape[-1]), self.again)


class Input:
    """One input of `users` linear layers that share a `Gemms`: the forward operand, and what is kept."""

    def __init__(self, gemms: Gemms, given: Activation, role: Role, users: int = 1, rows: Any = None) -> None:
        x_SI = given.value.detach().reshape(-1, given.value.shape[-1])
        self.rows = gemms.rows(x_SI, role) if rows is None else rows
        self.kept = given.again.tensors if given.again else gemms.keep(x_SI, self.rows, role)
        self.later = Later(gemms, role, users, given.again.function if given.again else None)


class Later:
    """The backward half of an `Input`: holds no tensor until the first layer asks, and none after the last."""

    def __init__(self, gemms: Gemms, role: Role, users: int, again: Callable[..., Tensor] | None) -> None:
        self._gemms, self.role, self._users, self._again = gemms, role, users, again
        self._columns: Any = None
        self._left = users

    def columns(self, kept: tuple[Tensor, ...]) -> Any:
        """The weight gradients' operand, from what autograd kept."""
        if self._columns is None:
            self._columns = self._make(kept)
        columns, self._left = self._columns, self._left - 1
        if self._left == 0:
            self._columns, self._left = None, self._users  # a graph that is kept may be walked again
        return columns

    @torch.no_grad()
    def _make(self, kept: tuple[Tensor, ...]) -> Any:
        if self._again is not None:
            value = self._again(*kept)
            x_SI = value.reshape(-1, value.shape[-1])
            kept = self._gemms.keep(x_SI, self._gemms.rows(x_SI, self.role), self.role)
        return self._gemms.columns(kept, self.role)
