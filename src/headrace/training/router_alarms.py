"""Alarms about routing: experts that get no token any more, and layers whose tokens all choose the same few experts.

The selection bias (report, arXiv 2412.19437, section 2.1.2) is there to prevent both. It moves by a constant per step,
so for a while, at the start and after a shift of the data, either may happen; where it lasts, part of the model is not
trained, and no loss curve says so. An alarm changes nothing in the run.
"""

from collections.abc import Sequence

from headrace.training.history import Load, max_violation

PATIENCE = 100
"""Steps in a row that make an alarm."""
COLLAPSED = 0.75
"""Of the largest MaxVio there is, E/K - 1, which a layer has whose tokens all choose the same K of E experts."""


class RouterAlarms:
    """Watches the layers named `layers`, whose tokens choose `chosen` experts each.

    A restart begins to count anew.
    """

    def __init__(self, layers: Sequence[str], chosen: int, patience: int = PATIENCE) -> None:
        self._layers, self._chosen, self._patience = layers, chosen, patience
        self._idle: list[list[int]] = [[] for _ in layers]  # steps in a row without a token, by expert
        self._collapsed = [0 for _ in layers]  # steps in a row

    def after_step(self, counts: Load) -> list[str]:
        """Sentences about what has lasted for `patience` steps with this one; each is told once until it ends.

        `counts` are the tokens of the global batch that chose each expert, by layer.
        """
        found = []
        for layer, (name, counts_E, violation) in enumerate(
            zip(self._layers, counts, max_violation(counts), strict=True)
        ):
            idle = self._idle[layer] or [0] * len(counts_E)
            self._idle[layer] = [steps + 1 if count == 0 else 0 for steps, count in zip(idle, counts_E, strict=True)]
            dead = [expert for expert, steps in enumerate(self._idle[layer]) if steps == self._patience]
            if dead:
                found.append(f"layer {name}: no token for {self._patience} steps at experts {_some(dead)}")
            largest = len(counts_E) / self._chosen - 1
            collapsed = largest > 0 and violation >= COLLAPSED * largest
            self._collapsed[layer] = self._collapsed[layer] + 1 if collapsed else 0
            if self._collapsed[layer] == self._patience:
                found.append(
                    f"layer {name}: MaxVio at or above {COLLAPSED * largest:.3g} for {self._patience} steps, "
                    f"{violation:.3g} now: most tokens choose the same experts"
                )
        return found


def _some(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts[:8])) + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
