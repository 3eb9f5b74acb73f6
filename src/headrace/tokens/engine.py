"""Text to token ids, by an engine that the configuration names: `fastokens`, or `tokenizers`, the reference.

Text must never become a control token: a web page that quotes the end-of-sentence string would end its document.
Flags such as "special" do not prevent it, since some control tokens carry none. Both engines therefore load a copy of
tokenizer.json that has no added tokens and no word that spells one; control ids are inserted by us alone. Character
classes such as \\p{L} depend on the Unicode tables of the engine, so ids depend on its version: both are measured here
and recorded with every shard.
"""

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import read_json
from headrace.errors import UserError

Name = Literal["auto", "fastokens", "tokenizers"]
Ids = NDArray[np.int32]
Flat = tuple[Ids, NDArray[np.int64]]

# The first letter that a version of Unicode added: an engine knows a version if it takes the letter for one.
_FIRST_LETTERS = {"13.0": 0x10E80, "14.0": 0x10570, "15.0": 0x11F04, "15.1": 0x2EBF0, "16.0": 0x105C0, "17.0": 0x10940}
_NO_TEXT = "\ue000control {}"  # U+E000 is none of the characters that stand for bytes


@dataclass(frozen=True)
class Engine:
    """A loaded engine. `encode` maps texts to (ids int32 [T], offsets int64 [texts + 1]); it adds no control ids."""

    name: str
    version: str
    unicode: str
    encode: Callable[[Sequence[str]], Flat]

    def identity(self) -> dict[str, str]:
        """What the ids depend on beside tokenizer.json."""
        return {"engine": self.name, "version": self.version, "unicode": self.unicode}


def open_engine(name: Name, tokenizer_json: Path) -> Engine:
    """Load tokenizer.json, without its added tokens, into engine `name`; `auto` takes fastokens where it is installed.

    Raises `UserError` when the engine asked for is not installed or cannot load the file.
    """
    chosen = pick(name)
    ordinary = without_added_tokens(tokenizer_json)
    try:
        encode = _LOADERS[chosen](ordinary)
    except Exception as error:  # the engines raise plain Exception and ValueError for files that they do not support
        raise UserError(f"{tokenizer_json}: {chosen} cannot load it: {error}; try another tokens.engine") from None
    return Engine(chosen, importlib.metadata.version(chosen), _unicode_version(chosen), encode)


def pick(name: Name) -> str:
    """The engine that `name` means here; `UserError` if it was asked for by name and is missing."""
    if name == "auto":
        return "fastokens" if _installed("fastokens") else "tokenizers"
    if not _installed(name):
        raise UserError(f"tokens.engine={name}: not installed; `pip install {name}` or set tokens.engine=auto")
    return name


def without_added_tokens(tokenizer_json: Path) -> str:
    """tokenizer.json without added tokens and what inserts them: ordinary ids stay, control ids cannot come up.

    Where the vocabulary, too, has the string of a control token, its id keeps its place under a name that no text is:
    some models take a whole word from the vocabulary without any merge. A file whose merges make a control token does
    not load.
    """
    tree = read_json(tokenizer_json)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise UserError(f"{tokenizer_json}: not a tokenizer.json of the `tokenizers` library")
    model, added = tree["model"], {token["content"] for token in tree.get("added_tokens") or ()}
    if isinstance(model.get("vocab"), dict):
        control = added - {model.get("unk_token")}  # stands for what has no id, and must have one itself
        renamed = {(_NO_TEXT.format(id_) if word in control else word): id_ for word, id_ in model["vocab"].items()}
        model = {**model, "vocab": renamed}
    without = {"model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return json.dumps({**tree, **without})


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _load_fastokens(tokenizer: str) -> Callable[[Sequence[str]], Flat]:
    import fastokens

    engine = fastokens.Tokenizer.from_json_str(tokenizer)

    def encode(texts: Sequence[str]) -> Flat:
        ids, offsets = engine.encode_batch_flat(list(texts))
        return np.frombuffer(ids, "<u4").astype(np.int32), np.frombuffer(offsets, "<u8").astype(np.int64)

    return encode


def _load_tokenizers(tokenizer: str) -> Callable[[Sequence[str]], Flat]:
    import tokenizers

    engine = tokenizers.Tokenizer.from_str(tokenizer)

    def encode(texts: Sequence[str]) -> Flat:
        rows = [encoding.ids for encoding in engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        return np.fromiter((id_ for row in rows for id_ in row), np.int32, int(offsets[-1])), offsets

    return encode


_LOADERS = {"fastokens": _load_fastokens, "tokenizers": _load_tokenizers}


def _unicode_version(name: str) -> str:
    """The newest Unicode version whose first new letter the engine's \\p{L} matches: measured, as no engine says it."""
    encode = _LOADERS[name](json.dumps(_probe()))
    known = [version for version, letter in _FIRST_LETTERS.items() if len(encode(["a" + chr(letter)])[0]) == 4]
    return known[-1] if known else "older than 13.0"


def _probe() -> dict[str, Any]:
    """A byte-level tokenizer that joins 'a' and the first of a following letter's four bytes, if \\p{L}+ holds both."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first_byte = "ð"  # how ByteLevel writes 0xF0
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {piece: id_ for id_, piece in enumerate([*alphabet, "a" + first_byte])}
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [["a", first_byte]],
        "fuse_unk": False,
        "byte_fallback": False,
    }
    model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
