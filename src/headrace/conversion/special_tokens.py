"""The tokenizer's part of a Hub folder: its two files, and the ids of begin, end and padding that generation needs.

The ids are read from the tokenizer, never assumed: `config.json` with another end-of-sequence id than the tokenizer's
makes a model that never stops.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json, sync_file
from headrace.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that begin a document, end it and pad a batch; `pad` is null for a tokenizer without one."""

    bos: int
    eos: int
    pad: int | None


def read_special_tokens(folder: Path, vocab_size: int) -> SpecialTokens:
    """Ids of the special tokens of a tokenizer folder, checked against the model's `vocab_size` rows.

    Raises `UserError` for a token that the configuration names and the tokenizer lacks, for an id past the embedding,
    and for a configuration that asks for code.
    """
    tokenizer, settings = (read_json(folder / name) for name in TOKENIZER_FILES)
    if "auto_map" in settings:
        raise UserError(f"{folder / TOKENIZER_FILES[1]}: auto_map asks for code; remove it, code is never loaded")
    ids = _ids(folder, tokenizer)
    last = max(ids.values())
    if last >= vocab_size:
        raise UserError(
            f"{folder / TOKENIZER_FILES[0]}: has token id {last}, model.vocab_size={vocab_size} is too small"
        )
    bos, eos, pad = (_id_of(folder, settings, ids, role) for role in ("bos_token", "eos_token", "pad_token"))
    if bos is None or eos is None:
        raise UserError(f"{folder / TOKENIZER_FILES[1]}: bos_token and eos_token must both be given")
    return SpecialTokens(bos, eos, pad)


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer's files byte for byte."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(folder / name, out / name)
        sync_file(out / name)


def _ids(folder: Path, tokenizer: Any) -> dict[str, int]:
    try:
        added = {str(token["content"]): int(token["id"]) for token in tokenizer["added_tokens"]}
        return {**tokenizer["model"]["vocab"], **added}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / TOKENIZER_FILES[0]}: not a tokenizer of the `tokenizers` library") from None


def _id_of(folder: Path, settings: Any, ids: dict[str, int], role: str) -> int | None:
    token = settings.get(role)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    if text not in ids:
        raise UserError(f"{folder / TOKENIZER_FILES[1]}: {role} {text!r} is not in {TOKENIZER_FILES[0]}")
    return ids[text]
