"""Which weights the sources of a corpus have at each row: `recipe.mixture` as segments of the data order.

Weights change at a number of tokens, like all else in the recipe, so the segments are a function of the configuration
and nothing of them needs to be saved. They change at the first row that begins at that number or behind it.
"""

from collections.abc import Sequence

from headrace.config.phases import tokens_in
from headrace.config.recipe import RecipeConfig
from headrace.errors import UserError
from headrace.tokens.order import Segment, State, whole_weights


def segments(recipe: RecipeConfig, sources: Sequence[str], sequence_length: int) -> tuple[Segment, ...] | None:
    """The segments for rows of `sequence_length` of these sources; None where rows of all sources are drawn alike.

    Rows of context extension are read by the last weights. Raises `UserError` where a source that is given a weight has
    no training text, and so is none of `sources`.
    """
    if not recipe.mixture:
        return None
    weighted = {name for entry in recipe.mixture for name, weight in entry.weights.items() if weight}
    if missing := sorted(weighted - set(sources)):
        raise UserError(f"recipe.mixture: the source {missing[0]} has no training text; give it text, or the weight 0")
    weights = [whole_weights([entry.weights[name] for name in sources]) for entry in recipe.mixture]
    if sequence_length != recipe.sequence_length:
        return State.start(weights[-1]).segments
    state = State.start(weights[0])
    for entry, later in zip(recipe.mixture[1:], weights[1:], strict=True):
        position = -(-tokens_in(entry.since, recipe.tokens) // sequence_length)
        position = max(position, state.segments[-1].position)
        state = state.advanced(position - state.position).reweighted(later)
    return state.segments
