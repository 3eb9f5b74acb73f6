"""The gate for what comes in: a model's folder of foreign origin, looked at before anything in it is used.

Importing reads config.json, the index and safetensors, and `conversion/hub_folder.py` checks those key by key and
tensor by tensor. This looks at the folder as a whole, where attacks sit that no reader of one file would see: links
that lead out of it, files that block whoever opens them, archives and pickles under any name, names that are something
else on another system or in a terminal, tokenizers and cards that ask for code, dimensions that would fill the memory.
Nothing is followed, unpacked or loaded, and nothing is written.

Names are on a closed list: what is read, and what repositories of models hold beside it and nobody here reads (text,
pictures, settings of other tools). Two things look odd and are fine: the Hub's cache keeps files as links to its blobs,
and DeepSeek's own releases carry code, which is passed over by name.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.artifacts.files import read_json
from headrace.artifacts.tensors import open_tensors
from headrace.errors import UserError
from headrace.publication.card_checks import front_matter_problem
from headrace.publication.gate import CODE, MIB, keys_problem

_NAME = re.compile(r"\.?[\w][\w .+()@=-]*(?<![ .])", re.ASCII)
_MAX_FILES, _MAX_DEPTH = 10_000, 8
_UNREAD = {".git", ".cache"}  # beside the files of a clone and of a download; nothing looks into them
_RELEASED = re.compile(r"(?:configuration|modeling)_deepseek\.py|inference/\w+\.py")
_KNOWN = (
    r"[\w.-]+\.(?:safetensors|json)",  # of JSON only what `_TEXT` names is read
    r"(?:LICEN[SC]E|NOTICE|COPYING|README|USE_POLICY)[\w.-]*|[\w-]+\.model|\.gitattributes|\.gitignore",
    r"(?:[\w -]+/)*[\w .+()@=-]+\.(?:md|rst|txt|jinja|cff|html|pdf|png|jpe?g|gif|svg|webp)",
    r"inference/(?:configs/)?[\w.-]+\.json|\.eval_results/[\w.-]+\.yaml",
    _RELEASED.pattern,
)
_LISTED = re.compile("|".join(_KNOWN), re.ASCII | re.IGNORECASE)
_ARCHIVES = (
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl", ".egg", ".jar", ".h5", ".keras",
    ".gguf", ".msgpack", ".onnx", ".exe", ".dll", ".dylib", ".bat", ".ps1",
)  # fmt: skip
_TEXT = {"config.json": MIB, "generation_config.json": MIB, "tokenizer_config.json": 4 * MIB, "README.md": MIB}
_TEXT |= {"special_tokens_map.json": 4 * MIB, "tokenizer.json": 64 * MIB, "model.safetensors.index.json": 64 * MIB}
_MAX_NUMBER = 1 << 40  # of anything that config.json counts; V3's largest is 129,280
_MAX_WEIGHTS = 1_000_000  # matrices of experts; V3 has 44,544


def inspect_incoming(folder: Path) -> None:
    """Refuse a folder that holds anything which a model's repository has no use for.

    Raises `UserError` that names the first file which is wrong, and why. What it lets pass is not yet known to be a
    model: that is for `open_hub_folder` to say.
    """
    for count, name in enumerate(_walk(folder, folder, ""), start=1):
        if count > _MAX_FILES:
            raise UserError(f"{folder}: import: more than {_MAX_FILES} files; this is no model")
        path = folder / name
        lowered = name.lower()
        if lowered.endswith(_ARCHIVES) or (lowered.endswith(CODE) and not _RELEASED.fullmatch(name)):
            raise _refusal(
                path, "is an archive or could hold code; remove it, only safetensors, JSON and text are read"
            )
        if not _LISTED.fullmatch(name):
            raise _refusal(path, "has a name that no file of a model's repository has; remove it")
        if name.endswith(".safetensors"):
            with open_tensors(path):
                pass
        elif name in _TEXT:
            _check_text(path, name)


def _walk(top: Path, folder: Path, prefix: str) -> Iterator[str]:
    """Ordinary files below `folder`, named from `top`; links, special files and odd names are refused on the way."""
    if prefix.count("/") > _MAX_DEPTH:
        raise _refusal(folder, f"lies more than {_MAX_DEPTH} folders deep")
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path, name = Path(entry.path), f"{prefix}{entry.name}"
        if not _NAME.fullmatch(entry.name):
            raise _refusal(path, "has a name that means something else elsewhere; rename it in plain letters")
        if entry.is_symlink():
            if not _is_blob(top, path):
                raise _refusal(path, "is a link that leads out of the folder; put the file itself there")
            yield name
        elif entry.is_dir(follow_symlinks=False):
            if name not in _UNREAD:
                yield from _walk(top, path, f"{name}/")
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            yield name
        else:
            raise _refusal(path, "is not an ordinary file")


def _is_blob(top: Path, link: Path) -> bool:
    """Whether a link is one of the Hub's cache: models--x--y/snapshots/<commit>/<name> to models--x--y/blobs/<hash>."""
    target = link.resolve()
    return (
        top.resolve().parent.name == "snapshots"
        and target.parent == top.resolve().parents[1] / "blobs"
        and target.is_file()
    )


def _check_text(path: Path, name: str) -> None:
    if path.stat().st_size > _TEXT[name]:
        raise _refusal(path, f"has {path.stat().st_size} bytes, more than the {_TEXT[name]} allowed for it")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _refusal(path, "is not UTF-8 text") from None
    if name == "README.md":
        wrong = front_matter_problem(text)
    else:
        value = read_json(path)
        wrong = _json_problem(name, value) if isinstance(value, dict) else "is no JSON object"
    if wrong:
        raise _refusal(path, wrong)


def _json_problem(name: str, value: Mapping[str, Any]) -> str | None:
    if name == "config.json":  # its keys have a closed list of their own
        return _dimensions_problem(value)
    if name == "model.safetensors.index.json":
        return None
    if name == "tokenizer.json":
        held = {key: item for key, item in value.items() if key not in ("model", "added_tokens")}
        return keys_problem(held, private=False) or _vocabulary_problem(value)
    return keys_problem(value, private=False)


def _dimensions_problem(config: Mapping[str, Any]) -> str | None:
    for key, number in config.items():
        if isinstance(number, int | float) and not abs(number) <= _MAX_NUMBER:  # NaN is never
            return f"{key} is larger than {_MAX_NUMBER}, or no number; no model has that"
    layers, experts = (config.get(key) for key in ("num_hidden_layers", "n_routed_experts"))
    if isinstance(layers, int) and layers * 3 * (experts if isinstance(experts, int) else 1) > _MAX_WEIGHTS:
        return f"has {layers} layers of {experts} experts, more than {_MAX_WEIGHTS} matrices"
    return None


def _vocabulary_problem(tokenizer: Mapping[str, Any]) -> str | None:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens", [])
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        return "is not a tokenizer of the `tokenizers` library"
    ids = [*vocabulary.values(), *(token.get("id") if isinstance(token, dict) else None for token in added)]
    if any(type(number) is not int or not 0 <= number < 2**31 for number in ids):
        return "has token ids that are no numbers from 0 to 2^31"
    return None


def _refusal(path: Path, reason: str) -> UserError:
    shown = str(path) if str(path).isprintable() else repr(str(path))
    return UserError(f"{shown}: import: {reason}")
