"""The environment corpus: text that every Python installation carries, so that nothing is downloaded or redistributed.

It is the standard library and those installed packages whose metadata declares a licence of the allow-list: source
code, headers, documentation, and one English book, the language reference of `pydoc_data/topics.py`, which is always
held out. Editable installs and Headrace itself are left out: they change with every edit. So is what differs between
two machines with the same packages: files that pip or the interpreter's build writes. Licence texts are left out
because every package repeats them: they would be training text and held-out text at once.
"""

import ast
import csv
import importlib.metadata
import json
import os
import re
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from headrace.corpus.licences import allowed, declared
from headrace.corpus.listing import ENVIRONMENT, Found
from headrace.errors import UserError

ENGLISH = "stdlib/pydoc_data/topics.py"

_KINDS = {
    **dict.fromkeys((".py", ".pyi", ".c", ".cpp", ".cu"), "code"),
    **dict.fromkeys((".h", ".hpp", ".cuh"), "header"),
    **dict.fromkeys((".md", ".rst"), "docs"),
    ".txt": "text",
}
_LICENCE_TEXT = re.compile(r"(?i)(licen[cs]e|copying|notice|authors|third_?party)")
_BUILD_SPECIFIC = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")  # written per interpreter build
_NOT_STDLIB = re.compile(r"site-packages|dist-packages|__pycache__|lib-dynload|config-.*")


@dataclass(frozen=True)
class Distribution:
    """One installed distribution: `refused` says why its files are left out, and is None where they are taken."""

    name: str
    version: str
    licence: str
    refused: str | None
    files: tuple[str, ...]  # relative to purelib, '/'-separated, of the suffixes that are text


def kind_of(name: str) -> str | None:
    """`code`, `header`, `docs` or `text` by suffix; None for a file that the environment corpus does not take."""
    base = name.rsplit("/", 1)[-1]
    return "docs" if base == "METADATA" else _KINDS.get(PurePosixPath(base).suffix)


def list_environment(
    packages: bool, licences: Collection[str], stdlib: Path | None = None, purelib: Path | None = None
) -> list[Found]:
    """The files of the standard library and, with `packages`, of licensed distributions, sorted by root and name.

    `stdlib` and `purelib` are this interpreter's own unless given. Names do not depend on where they lie.
    """
    library = stdlib or Path(sysconfig.get_path("stdlib"))
    found = [Found(f"stdlib/{name}", f"{library}/{name}", "stdlib", ENVIRONMENT) for name in _stdlib_files(library)]
    if packages:
        site = purelib or Path(sysconfig.get_path("purelib"))
        for distribution in distributions(licences, site):
            root = f"packages/{distribution.name}"
            found += [Found(f"{root}/{name}", f"{site}/{name}", root, ENVIRONMENT) for name in distribution.files]
    unique = {file.name: file for file in found}
    return sorted(unique.values(), key=lambda file: (file.root, file.name))


def environment_path(name: str) -> str:
    """Where a file of the environment corpus lies for this interpreter."""
    root, _, rest = name.partition("/")
    return f"{_place('stdlib')}/{rest}" if root == "stdlib" else f"{_place('purelib')}/{rest.partition('/')[2]}"


@cache
def _place(kind: str) -> str:
    return sysconfig.get_path(kind)


def distributions(licences: Collection[str], purelib: Path | None = None) -> list[Distribution]:
    """Every distribution installed in `purelib`, taken or refused, sorted by name."""
    site = purelib or Path(sysconfig.get_path("purelib"))
    described = [_describe(each, site, licences) for each in importlib.metadata.distributions(path=[str(site)])]
    return sorted(described, key=lambda distribution: (distribution.name, distribution.version))


def english_topics(source: str, where: str) -> Iterator[tuple[str, str]]:
    """(topic, prose) of `pydoc_data/topics.py`, sorted: the values of its one dictionary, not the code around them."""
    try:
        tree = ast.parse(source)
        values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
        topics = ast.literal_eval(values[0])
        yield from sorted((str(topic), str(prose)) for topic, prose in topics.items())
    except (SyntaxError, ValueError, IndexError, AttributeError):
        raise UserError(f"{where}: holds no dictionary of topics; reinstall Python or use corpus=files") from None


def _stdlib_files(library: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if not _NOT_STDLIB.fullmatch(name)]
        relative = os.path.relpath(folder, library).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        for name in names:
            if _wanted(name) and not _BUILD_SPECIFIC.fullmatch(name) and not Path(folder, name).is_symlink():
                yield prefix + name


def _wanted(name: str) -> bool:
    """Text by suffix, no licence text, nothing that an installer or the interpreter writes."""
    base = name.rsplit("/", 1)[-1]
    if kind_of(base) is None or "__pycache__" in name:
        return False
    return not (_LICENCE_TEXT.match(base) and kind_of(base) in {"docs", "text"})


def _describe(each: importlib.metadata.Distribution, site: Path, licences: Collection[str]) -> Distribution:
    metadata = each.metadata
    name = re.sub(r"[-_.]+", "-", metadata["Name"] or "").lower()
    expression, field = (next(iter(metadata.get_all(key) or []), None) for key in ("License-Expression", "License"))
    found = declared(expression, field, metadata.get_all("Classifier") or [])
    record = each.read_text("RECORD")
    refused = _refusal(name, found, record, each.read_text("direct_url.json"), licences)
    files = () if refused or record is None else tuple(sorted(_recorded(record, site)))
    return Distribution(name, metadata["Version"] or "", " AND ".join(found), refused, files)


def _refusal(
    name: str, found: list[str], record: str | None, direct_url: str | None, licences: Collection[str]
) -> str | None:
    if name == "headrace" or (direct_url and json.loads(direct_url).get("dir_info", {}).get("editable")):
        return "installed for editing"
    if record is None:
        return "no list of installed files"
    if not found:
        return "declares no licence that is understood"
    return next((f"licence not allowed: {each}" for each in found if not allowed(each, licences)), None)


def _recorded(record: str, site: Path) -> Iterator[str]:
    for row in csv.reader(record.splitlines()):
        name = row[0] if row else ""
        outside = name.startswith("/") or ".." in name.split("/")  # scripts and data files lie outside purelib
        if not outside and _wanted(name) and os.path.isfile(f"{site}/{name}"):  # noqa: PTH113 - ten thousands
            yield name
