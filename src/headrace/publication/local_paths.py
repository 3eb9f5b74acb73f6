"""Paths without the folders of this machine, for what others read: whose they are is nobody's business."""

import re

_LITERALS = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?:\\.|[^'"\[\]{},\\])+""", re.DOTALL)
# Quote, a dictionary's key (the scheme of an address is none), value, quote.
_PARTS = re.compile(r"""(['"]?)(\s*(?:\w+:(?!//)\s*)?)(.*)(\1)""", re.DOTALL)


def base_name(text: str) -> str:
    """The last part of an absolute path, `~/` and `file://` included; any other text, such as an address, as it is."""
    path = text.removeprefix("file://")
    return path.rstrip("/").rpartition("/")[2] if path.startswith(("/", "~")) else text


def without_folders(override: str) -> str:
    """A Hydra override (`key=value`) in whose value every absolute path, quoted or in lists, is its base name."""
    key, equals, value = override.partition("=")
    return key + equals + _LITERALS.sub(_shortened, value)


def _shortened(literal: re.Match[str]) -> str:
    return _PARTS.sub(lambda parts: f"{parts[1]}{parts[2]}{base_name(parts[3])}{parts[4]}", literal[0])
