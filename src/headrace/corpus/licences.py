"""What licence does an installed package declare, and is it on the allow-list?

Metadata says it in up to three places: `License-Expression` (an SPDX expression, PEP 639), the free `License` field,
and trove classifiers. The expression is decisive where it stands. Otherwise everything that can be understood must be
allowed: a package whose field says MIT and whose classifier says GPL is left out, as are two classifiers of which one
is not allowed. This reads metadata; it is no legal advice.
"""

import itertools
import re
from collections.abc import Collection, Sequence

_CLASSIFIERS = {
    "mit license": "MIT",
    "mit no attribution license (mit-0)": "MIT-0",
    "bsd license": "BSD-2-Clause AND BSD-3-Clause",  # the classifier does not say which: both must be allowed
    "apache software license": "Apache-2.0",
    "python software foundation license": "PSF-2.0",
    "isc license (iscl)": "ISC",
    "zero-clause bsd (0bsd)": "0BSD",
    "the unlicense (unlicense)": "Unlicense",
    "zlib/libpng license": "Zlib",
    "historical permission notice and disclaimer (hpnd)": "HPND",
    "boost software license 1.0 (bsl-1.0)": "BSL-1.0",
    "cc0 1.0 universal (cc0 1.0) public domain dedication": "CC0-1.0",
}

# The `License` field in the spellings that are met, after `_normalise`.
_SPELLINGS = {
    "mit": "MIT",
    "apache 2.0": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "apache software": "Apache-2.0",
    "apache software 2.0": "Apache-2.0",
    "bsd": "BSD-2-Clause AND BSD-3-Clause",
    "bsd 2-clause": "BSD-2-Clause",
    "2-clause bsd": "BSD-2-Clause",
    "simplified bsd": "BSD-2-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "3-clause bsd": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "isc": "ISC",
    "psf": "PSF-2.0",
    "psfl": "PSF-2.0",
    "python software foundation": "PSF-2.0",
    "zlib": "Zlib",
    "unlicense": "Unlicense",
    "hpnd": "HPND",
}

_TOKEN = re.compile(r"\s*(\(|\)|[A-Za-z0-9.+-]+(?::[A-Za-z0-9.-]+)?)")
_MEANS_NOTHING = {"osi approved", "dfsg approved"}  # classifiers that name no licence


def declared(expression: str | None, field: str | None, classifiers: Sequence[str]) -> list[str]:
    """The SPDX expressions that a package's metadata declares, all of which bind; empty when nothing is understood.

    `expression` is `License-Expression`, `field` is `License`, `classifiers` are all trove classifiers.
    A classifier that names a licence unknown here is returned as it stands, which no allow-list holds.
    """
    if expression and expression.strip():
        return [expression.strip()]
    found = [] if field is None else _from_field(field)
    for classifier in classifiers:
        parts = [part.strip() for part in classifier.split("::")]
        if parts[0] == "License" and parts[-1].lower() not in _MEANS_NOTHING:
            found.append(_CLASSIFIERS.get(parts[-1].lower(), parts[-1]))
    return list(dict.fromkeys(found))


def allowed(expression: str, allow: Collection[str]) -> bool:
    """Whether an SPDX expression can be satisfied with licences of `allow` alone.

    OR needs one side, AND both; `X WITH exception` counts as X, since an exception only adds permissions. Text that is
    not an SPDX expression is never allowed.
    """
    words = _split(expression)
    if words is None:
        return False
    known = {name.lower() for name in allow}
    try:
        verdict, rest = _either(words, known)
    except IndexError:  # the expression ends where an operand is due
        return False
    return verdict and not rest


def _from_field(field: str) -> list[str]:
    """The expression in the `License` field, if it has one: the field may hold a licence text or anything else."""
    line = next((line.strip() for line in field.splitlines() if line.strip()), "")
    spelled = _SPELLINGS.get(_normalise(line))
    if spelled:
        return [spelled]
    words = _split(line)
    if words is None or any(not {first, second} & _OPERATORS for first, second in itertools.pairwise(words)):
        return []  # prose such as "Dual License" or a copyright line: it states nothing
    return [line] if words else []


def _normalise(text: str) -> str:
    text = re.sub(r"\([^)]*\)", " ", text.lower()).replace(",", " ")
    words = [word for word in text.split() if word not in {"the", "license", "licence", "version", "v"}]
    return " ".join(words)


_OPERATORS = {"(", ")", "AND", "OR", "WITH"}


def _split(text: str) -> list[str] | None:
    words, position = [], 0
    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        word = match[1]
        words.append(word.upper() if word.upper() in _OPERATORS else word)
        position = match.end()
    return words


def _either(words: list[str], known: set[str]) -> tuple[bool, list[str]]:
    verdict, rest = _both(words, known)
    while rest and rest[0] == "OR":
        other, rest = _both(rest[1:], known)
        verdict = verdict or other
    return verdict, rest


def _both(words: list[str], known: set[str]) -> tuple[bool, list[str]]:
    verdict, rest = _single(words, known)
    while rest and rest[0] == "AND":
        other, rest = _single(rest[1:], known)
        verdict = verdict and other
    return verdict, rest


def _single(words: list[str], known: set[str]) -> tuple[bool, list[str]]:
    if words[0] == "(":
        verdict, rest = _either(words[1:], known)
        return verdict and rest[0] == ")", rest[1:]
    verdict, rest = words[0].lower() in known, words[1:]
    if rest and rest[0] == "WITH":
        return verdict, rest[2:]
    return verdict, rest
