"""Addresses of Hub repositories: only those that name their content."""

import pytest

from headrace.config.addresses import is_address, repository
from headrace.errors import UserError

COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_an_address_with_a_commit_is_taken_apart() -> None:
    assert repository(f"hf://deepseek-ai/DeepSeek-V3@{COMMIT}") == ("deepseek-ai/DeepSeek-V3", COMMIT)


@pytest.mark.parametrize(
    "address",
    [
        "hf://owner/name",
        "hf://owner/name@main",
        f"hf://owner/name@{COMMIT[:-1]}",
        f"hf://owner/name@{COMMIT}0",
        f"hf://owner/name@{COMMIT.upper()}",
        f"hf://name@{COMMIT}",
        f"hf://owner/name/file@{COMMIT}",
        f"hf://owner/../name@{COMMIT}",
    ],
)
def test_one_that_names_no_content_is_refused(address: str) -> None:
    assert is_address(address)
    with pytest.raises(UserError, match="the commit's 40 hexadecimal digits"):
        repository(address)


def test_paths_are_no_addresses() -> None:
    assert not is_address("tokenizer.json") and not is_address(None) and not is_address("/hf://owner/name")
