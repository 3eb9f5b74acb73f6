"""The gate: nothing leaves the machine that is not on a closed list of file names and free of code and secrets.

A published model is data: safetensors, JSON, and a card. Scanners for pickles have been bypassed often, so no format
that can run code is let through at all, and no key of a JSON file that makes a loader run some (`auto_map`,
`_attn_implementation`). A chat template may go out, in a file of its own as in `tokenizer_config.json`: transformers
renders it in Jinja's sandbox. Text, also that in the headers of safetensors, is searched for secrets by their look and
by entropy; a tokenizer's vocabulary, which is full of strange words, only by their look. The first thing that is wrong
is refused with the name of its file.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json
from headrace.artifacts.tensors import MAX_HEADER_BYTES, open_tensors
from headrace.conversion.hub_config import refuse_unknown_keys
from headrace.errors import UserError
from headrace.publication.card_checks import card_problem, eval_results_problem
from headrace.tracking.redact import find_secrets

MIB, GIB = 1 << 20, 1 << 30
_ALLOWED: tuple[tuple[str, int], ...] = (  # name, most bytes
    (r"README\.md|headrace\.json|evaluation\.json|chat_template\.jinja", MIB),
    (r"(?:LICEN[SC]E|NOTICE)(?:-\w+)?(?:\.(?:md|txt))?", MIB),
    (r"\.eval_results/[a-z0-9][a-z0-9_.-]{0,80}\.yaml", MIB),
    (r"config\.json|generation_config\.json|tokenizer_config\.json|special_tokens_map\.json", 4 * MIB),
    (r"tokenizer\.json|model\.safetensors\.index\.json", 64 * MIB),
    (r"model(?:-\d{5}-of-\d{5,6})?\.safetensors", 50 * GIB),
)
_DATASET: tuple[tuple[str, int], ...] = (
    (r"README\.md|LICENSE", MIB),
    (r"headrace\.json|dataset\.json|tokenizer\.json", 64 * MIB),
    (r"data/[a-z0-9][\w.-]{0,200}\.(?:arrow|bin|idx)", 50 * GIB),
)
_CHECKPOINT: tuple[tuple[str, int], ...] = (
    (r"(?:manifest|slices|state)\.json", 256 * MIB),
    (r"(?:model|optimizer|ema)-\d{5,}\.safetensors", 50 * GIB),
)
CODE = (".py", ".pyc", ".so", ".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".joblib", ".sh")
_MAX_FILES = 10_000
_MAX_DEPTH = 100  # of nested JSON; Python itself gives up near 1000
LOADER_KEYS = {"auto_map", "trust_remote_code", "custom_pipelines"}
_WORD = re.compile(r"[A-Za-z0-9+=_-]{32,}")
_MIN_ENTROPY = 4.3  # bits per character; 32 random letters and digits have about 4.6
_MIN_CHANGES = 0.42  # share of neighbours of different kind; random letters and digits 0.62, words stuck together 0.35


def inspect(folder: Path) -> list[str]:
    """The files of a repository's tree that may go out, as sorted relative paths; this is what a dry run prints.

    Raises `UserError` that names the first file which may not, and why.
    """
    names = _inspect(folder, _ALLOWED)
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder}: publish: no model here (config.json and model*.safetensors are needed)")
    refuse_unknown_keys(folder / "config.json", read_json(folder / "config.json"))
    return names


def inspect_dataset(folder: Path) -> list[str]:
    """The files of a token data set's tree that may go out, as `inspect`; tokens are numbers and not searched."""
    names = _inspect(folder, _DATASET)
    if "README.md" not in names or not any(name.startswith("data/") for name in names):
        raise UserError(f"{folder}: publish: no data set here (README.md and data/ are needed)")
    return names


def inspect_checkpoint(folder: Path) -> list[str]:
    """The files of a training checkpoint, all of which may go out, as `inspect`."""
    return _inspect(folder, _CHECKPOINT)


def _inspect(folder: Path, allowed: tuple[tuple[str, int], ...]) -> list[str]:
    names = sorted(_walk(folder))
    if len(names) > _MAX_FILES:
        raise UserError(f"{folder}: publish: {len(names)} files are too many; at most {_MAX_FILES}")
    for name in names:
        _check_name(folder, name, allowed)
    for name in names:
        if not name.startswith("data/"):
            _check_content(folder / name, name)
    return names


def _walk(folder: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if entry.is_symlink():
            raise _refusal(path, "is a symbolic link; publish the file itself")
        if entry.is_dir(follow_symlinks=False):
            for name in _walk(path):
                yield f"{entry.name}/{name}"
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            yield entry.name
        else:
            raise _refusal(path, "is not an ordinary file")


def _check_name(folder: Path, name: str, allowed: tuple[tuple[str, int], ...]) -> None:
    path = folder / name
    limit = next((size for pattern, size in allowed if re.fullmatch(pattern, name)), None)
    if limit is None and name.lower().endswith(CODE):
        raise _refusal(path, "code and formats that can run code are never published")
    if limit is None:
        raise _refusal(path, "is not on the list of files that this repository may hold (publication/gate.py)")
    if path.stat().st_size > limit:
        raise _refusal(path, f"has {path.stat().st_size} bytes, more than the {limit} allowed for it")


def _check_content(path: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        with open_tensors(path):
            pass
        header = header_text(path)
        _check_secrets(path, header, "of the text in its header ")
        _check_entropy(path, header, "of the text in its header ")
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _refusal(path, "is not UTF-8 text") from None
    _check_secrets(path, text)
    if not name.endswith(".json"):
        _check_entropy(path, text)
        wrong = card_problem(text) if name == "README.md" else None
        if name.endswith(".yaml"):
            wrong = eval_results_problem(text)
        if wrong:
            raise _refusal(path, wrong)
        return
    value = read_json(path)
    if not isinstance(value, dict):
        raise _refusal(path, "is no JSON object")
    if name == "tokenizer.json":
        value = {key: item for key, item in value.items() if key not in ("model", "added_tokens")}
    if name == "state.json":
        value = {key: item for key, item in value.items() if key != "random"}  # states of generators, in base64
    if wrong := keys_problem(value, private="config" in name):
        raise _refusal(path, wrong)
    _check_entropy(path, json.dumps(value, ensure_ascii=False))


def header_text(path: Path) -> str:
    """Keys and strings of a safetensors header, metadata and tensor names, a line for each key.

    A key that stands there twice is twice in it: readers keep one of the two, and the other one would go out unseen.
    """
    lines: list[str] = []

    def gather(pairs: list[tuple[str, Any]]) -> None:
        lines.extend(f"{key}: {value}" if isinstance(value, str) else key for key, value in pairs)

    with path.open("rb") as file:  # `open_tensors` has refused a header that is longer than the cap
        header = file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES))
    json.loads(header, object_pairs_hook=gather)
    return "\n".join(lines)


def keys_problem(value: Any, private: bool, depth: int = 0) -> str | None:
    """Which key of a JSON value makes a loader run code, if any; with `private`, a leading underscore does."""
    if depth > _MAX_DEPTH:
        return f"is nested more than {_MAX_DEPTH} deep"
    items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    for key in value if isinstance(value, dict) else ():
        if key in LOADER_KEYS or (private and key.startswith("_")):
            return f"holds the key {key!r}, which loaders act upon; remove it"
    found = (keys_problem(item, private, depth + 1) for item in items if isinstance(item, dict | list))
    return next((wrong for wrong in found if wrong), None)


def _check_secrets(path: Path, text: str, of: str = "") -> None:
    for kind, start, _ in find_secrets(text):
        line = text.count("\n", 0, start) + 1
        raise _refusal(path, f"line {line} {of}holds what looks like {kind}; remove it, and revoke it if it is real")


def _check_entropy(path: Path, text: str, of: str = "") -> None:
    for match in _WORD.finditer(text):
        if looks_random(match[0]):
            line = text.count("\n", 0, match.start()) + 1
            raise _refusal(
                path, f"line {line} {of}holds {len(match[0])} random-looking characters, as a key would; remove them"
            )


def looks_random(word: str) -> bool:
    """Whether a word is written like a key: both cases, digits, mixed at every step, and nearly no repetition.

    Hex digits never are (hashes are published on purpose), nor are alphabets and words stuck together.
    """
    kinds = ["digit" if c.isdigit() else "lower" if c.islower() else "upper" if c.isupper() else "sign" for c in word]
    if not {"digit", "lower", "upper"} <= set(kinds):
        return False
    changes = sum(before != after for before, after in pairwise(kinds)) / (len(word) - 1)
    shares = [count / len(word) for count in Counter(word).values()]
    return changes > _MIN_CHANGES and -sum(share * math.log2(share) for share in shares) > _MIN_ENTROPY


def _refusal(path: Path, reason: str) -> UserError:
    shown = str(path) if str(path).isprintable() else repr(str(path))
    return UserError(f"{shown}: publish: {reason}")
