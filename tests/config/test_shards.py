"""The number of shards follows from the configuration alone."""

import pytest

from headrace.config.compose import load
from headrace.config.shards import training_shards


@pytest.mark.parametrize(
    ("words", "shards"),
    [
        ([], 8),
        (["tokens.shards=3"], 3),
        (["tokens.shards=3", "tokens.total=14.8e12"], 3),
        ([f"tokens.total={1 << 31}"], 1),
        ([f"tokens.total={(1 << 31) + 1}"], 2),
        (["tokens.total=14_800_000_000_000"], 6892),  # 14.8T of 2^31 each, as the plan has it
    ],
)
def test_shards_that_are_asked_for_or_follow_from_the_tokens(words: list[str], shards: int) -> None:
    assert training_shards(load(words).tokens) == shards
