"""The recipe's mixture: weights change at a number of tokens, and every block has its proportions exactly."""

from collections import Counter

import numpy as np
import pytest

from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.recipe.mixture import segments
from headrace.tokens.order import Mixture

SOURCES = "corpus.sources=[{name: web, paths: [w], text_field: text}, {name: code, paths: [c], text_field: text}]"


def mixed(*entries: str) -> Config:
    return load(["experiment=tiny", "corpus=files", SOURCES, f"recipe.mixture=[{', '.join(entries)}]"])


def test_weights_change_at_the_tokens_that_the_recipe_names() -> None:
    recipe = mixed("{since: 0, weights: {web: 0.7, code: 0.3}}", "{since: 50%, weights: {web: 0.5, code: 0.5}}").recipe
    found = segments(recipe, ["code", "web"], recipe.sequence_length)
    assert found is not None
    change = recipe.tokens // 2 // recipe.sequence_length
    first, second = found[0], found[-1]
    assert (first.weights, second.weights) == ((3, 7), (1, 1))
    assert second.position == change
    mixture = Mixture(0, ["code", "web"], [1000, 1000], found)
    drawn, _ = mixture.draw(np.arange(second.position + 100))
    assert Counter(drawn[:change].tolist()) == {0: round(0.3 * change), 1: round(0.7 * change)}
    assert Counter(drawn[second.position :].tolist()) == {0: 50, 1: 50}


def test_rows_of_context_extension_are_read_by_the_last_weights() -> None:
    recipe = mixed("{since: 0, weights: {web: 1, code: 0}}", "{since: 90%, weights: {web: 1, code: 3}}").recipe
    found = segments(recipe, ["web", "code"], 256)
    assert found is not None
    assert [segment.weights for segment in found] == [(1, 3)]


@pytest.mark.parametrize("share", ["0.66667", "0.3333333"])
def test_weights_of_many_digits_change_on_time_too(share: str) -> None:
    """A block of such weights is longer than the run."""
    before = f"{{since: 0, weights: {{web: {share}, code: {1 - float(share):.7f}}}}}"
    recipe = mixed(before, "{since: 50%, weights: {web: 0, code: 1}}").recipe
    found = segments(recipe, ["web", "code"], recipe.sequence_length)
    change, rows = recipe.tokens // 2 // recipe.sequence_length, recipe.tokens // recipe.sequence_length
    assert found is not None and found[0].block > rows
    drawn, _ = Mixture(0, ["web", "code"], [1000, 1000], found).draw(np.arange(rows))
    assert Counter(drawn[:change].tolist())[0] == round(change * float(share))
    assert set(drawn[change:].tolist()) == {1}


def test_one_named_source_is_a_mixture_and_one_without_text_may_have_no_weight() -> None:
    recipe = mixed("{since: 0, weights: {web: 1, code: 0}}").recipe
    found = segments(recipe, ["web"], recipe.sequence_length)
    assert found is not None and [segment.weights for segment in found] == [(1,)]


def test_changes_within_a_block_follow_each_other() -> None:
    recipe = mixed(
        *(f"{{since: {tokens}, weights: {{web: {web}, code: 99}}}}" for tokens, web in ((0, 1), (1, 2), (2, 3)))
    ).recipe
    found = segments(recipe, ["web", "code"], recipe.sequence_length)
    assert found is not None
    assert [(segment.position, segment.weights) for segment in found] == [
        *((0, (1, 99)), (0, (0, 1))),  # of a block of 100 its first row alone
        *((1, (2, 99)), (1, (1, 33))),  # both begin within the row that begins at token 0
    ]


def test_without_a_mixture_rows_of_all_sources_are_drawn_alike() -> None:
    assert segments(load(["experiment=tiny"]).recipe, ["web", "code"], 128) is None


def test_a_source_without_training_text_is_named() -> None:
    recipe = mixed("{since: 0, weights: {web: 0.7, code: 0.3}}").recipe
    with pytest.raises(UserError, match="the source code has no training text"):
        segments(recipe, ["web"], recipe.sequence_length)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["{since: 1, weights: {web: 1, code: 1}}"], "must begin with 0 and rise"),
        (["{since: 0, weights: {web: 1, code: 1}}"] * 2, "must begin with 0 and rise"),
        (["{since: 0, weights: {web: 1}}"], r"names \['web'\], and corpus.sources are \['code', 'web'\]"),
        (["{since: 0, weights: {web: 0, code: 0}}"], "are all 0"),
    ],
)
def test_impossible_mixtures_are_refused(entries: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        mixed(*entries)
