"""Phases: their batches, and the layout and microbatch of each."""

from dataclasses import replace

import pytest

from headrace.config.compose import load
from headrace.config.phases import (
    MAIN,
    RAMP,
    batches_of,
    layout_of,
    microbatch_of,
    phase_names,
    sequence_length_of,
    tokens_in,
)

PUBLISHED = load(["experiment=v3_671b"])


def test_the_published_recipe_has_four_phases() -> None:
    recipe = PUBLISHED.recipe
    names = phase_names(recipe)
    assert names[:2] == (RAMP, MAIN) and len(names) == 4
    assert [sequence_length_of(recipe, name) for name in names] == [4096, 4096, 32_768, 131_072]
    ramp = batches_of(recipe, RAMP)
    assert (ramp[0], ramp[-1] < 15_360, tuple(batches_of(recipe, MAIN))) == (3072, True, (15_360,))
    assert phase_names(replace(recipe, batch_ramp=None))[0] == MAIN


def test_a_span_is_tokens_or_a_share() -> None:
    assert [tokens_in(span, 14_800) for span in (123, "50%", "0.5%")] == [123, 7400, 74]


def test_a_phase_has_what_is_said_of_it_and_the_rest_from_the_general_layout() -> None:
    general = PUBLISHED.parallel
    given = general.phases[0]
    found = layout_of(general, given.phase)
    assert found != general and found.expert == (general.expert if given.expert is None else given.expert)
    assert found.schedule == given.schedule
    assert layout_of(general, "nothing is said of it") == general


@pytest.mark.parametrize(
    ("pipeline", "microbatch", "rows", "expected"),
    [
        (1, None, 12, 12),
        (2, None, 8, 2),  # 4 microbatches, twice the pipeline's ranks
        (2, None, 12, 3),
        (2, None, 9, 1),  # no even number of microbatches
        (2, None, 2, 1),
        (4, None, 32, 4),
        (2, 5, 20, 5),  # what is said holds
    ],
)
def test_a_pipeline_is_left_an_even_number_of_microbatches(
    pipeline: int, microbatch: int | None, rows: int, expected: int
) -> None:
    assert microbatch_of(replace(PUBLISHED.parallel, pipeline=pipeline, microbatch=microbatch), rows) == expected
