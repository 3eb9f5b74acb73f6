"""The phases of a recipe, as far as a layout must know them: how large their batches are, and how each is laid out.

    ramp    while the batch grows; only with `recipe.batch_ramp`
    main    the rest of `recipe.tokens`
    ...     each context extension, under its own name

What holds at a step within a phase is not here but in `recipe/schedule.py`, which builds on this.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

from headrace.config.recipe import ExtensionConfig, RecipeConfig
from headrace.config.schema import ParallelConfig
from headrace.config.values import TokenSpan

RAMP, MAIN = "ramp", "main"


def tokens_in(span: TokenSpan, budget: int) -> int:
    """Tokens that a `TokenSpan` means under a budget of `budget` tokens."""
    if isinstance(span, int):
        return span
    return round(float(span.removesuffix("%")) * budget / 100)


def phase_names(recipe: RecipeConfig) -> tuple[str, ...]:
    """The phases in their order."""
    ramp = (RAMP,) if recipe.batch_ramp else ()
    return (*ramp, MAIN, *(extension.name for extension in recipe.extensions))


def batches_of(recipe: RecipeConfig, phase: str) -> Sequence[int]:
    """The numbers of sequences that a step of this phase may have, ascending."""
    if phase == MAIN:
        return (recipe.batch_sequences,)
    if phase == RAMP and recipe.batch_ramp:
        return range(recipe.batch_ramp.from_sequences, recipe.batch_sequences, recipe.batch_ramp.multiple)
    return (_extension(recipe, phase).batch_sequences,)


def sequence_length_of(recipe: RecipeConfig, phase: str) -> int:
    """Tokens of a training row in this phase."""
    return recipe.sequence_length if phase in (RAMP, MAIN) else _extension(recipe, phase).sequence_length


def layout_of(parallel: ParallelConfig, phase: str) -> ParallelConfig:
    """The layout in this phase: what `parallel.phases` says of it, and the general one for the rest."""
    for given in parallel.phases:
        if given.phase == phase:
            changed = {field.name: getattr(given, field.name) for field in fields(given) if field.name != "phase"}
            return replace(parallel, **{name: value for name, value in changed.items() if value is not None})
    return parallel


def microbatch_of(layout: ParallelConfig, rows: int) -> int:
    """Sequences of one forward pass, of the `rows` that a data rank has in a step.

    Where `parallel.microbatch` says nothing, one pipeline rank takes all at once, and several take as many as leave an
    even number of at least 2 PP microbatches, what DualPipe needs; where nothing does, one sequence.
    """
    if layout.microbatch is not None:
        return layout.microbatch
    if layout.pipeline == 1:
        return rows
    sizes = range(rows // (2 * layout.pipeline), 0, -1)
    return next((size for size in sizes if rows % size == 0 and rows // size % 2 == 0), 1)


def _extension(recipe: RecipeConfig, phase: str) -> ExtensionConfig:
    return next(extension for extension in recipe.extensions if extension.name == phase)
