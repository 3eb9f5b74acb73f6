"""Addresses of Hub repositories: `hf://owner/name@commit`. What is hashed must name its content, so only by commit."""

import re
from typing import TypeGuard

from headrace.errors import UserError

_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")


def is_address(path: str | None) -> TypeGuard[str]:
    """Whether a path is a Hub address."""
    return path is not None and path.startswith("hf://")


def repository(address: str) -> tuple[str, str]:
    """(repository, commit); `UserError` for an address without a whole commit hash."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise UserError(f"{address}: give hf://owner/name@ and the commit's 40 hexadecimal digits (branches move)")
    return found["repo"], found["commit"]
