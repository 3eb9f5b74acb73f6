"""Licence metadata in all the forms that installed packages show."""

import pytest

from headrace.corpus.licences import allowed, declared

ALLOW = ["MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "PSF-2.0", "ISC"]


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", False),
        ("(Apache-2.0 OR GPL-2.0-only) AND MIT", True),
        ("MIT or GPL-2.0-only and GPL-3.0-only", True),  # AND binds tighter
        ("(MIT OR GPL-2.0-only) AND GPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-3.0-only WITH GCC-exception-3.1", False),
        ("MIT AND", False),
        ("(MIT", False),
        ("MIT) OR MIT", False),
        ("", False),
        ("see the file LICENSE", False),
        ("LicenseRef-Proprietary", False),
    ],
)
def test_an_expression_is_allowed_only_if_allowed_licences_satisfy_it(expression: str, verdict: bool) -> None:
    assert allowed(expression, ALLOW) is verdict


@pytest.mark.parametrize(
    ("expression", "field", "classifiers", "taken"),
    [
        ("Apache-2.0 AND MIT", None, [], True),
        ("GPL-3.0-only", "MIT", ["License :: OSI Approved :: MIT License"], False),  # the expression is decisive
        (None, "MIT", [], True),
        (None, "The MIT License (MIT)", [], True),
        (None, "Apache License, Version 2.0", [], True),
        (None, "3-Clause BSD License", [], True),
        (None, "MIT License\n\nCopyright (c) 2020 Somebody\n\nPermission is hereby granted", [], True),
        (None, "MIT OR Apache-2.0", [], True),
        (None, "Dual License", ["License :: OSI Approved :: BSD License"], True),  # the field states nothing
        (None, "Copyright (c) 2001 Enthought", ["License :: OSI Approved :: BSD License"], True),
        (None, "GPL", ["License :: OSI Approved :: MIT License"], False),  # contradiction
        (None, "MIT", ["License :: OSI Approved :: GNU General Public License v3 (GPLv3)"], False),
        (None, None, ["License :: OSI Approved", "License :: DFSG approved"], False),
        (None, None, ["License :: OSI Approved :: MIT License", "License :: Public Domain"], False),
        (None, None, ["Programming Language :: Python"], False),
        (None, "UNKNOWN", [], False),
        (None, None, [], False),
    ],
)
def test_metadata_is_read_conservatively(
    expression: str | None, field: str | None, classifiers: list[str], taken: bool
) -> None:
    found = declared(expression, field, classifiers)
    assert (bool(found) and all(allowed(each, ALLOW) for each in found)) is taken


def test_the_unspecific_bsd_classifier_needs_both_bsd_licences() -> None:
    (found,) = declared(None, None, ["License :: OSI Approved :: BSD License"])
    assert allowed(found, ["BSD-2-Clause", "BSD-3-Clause"])
    assert not allowed(found, ["BSD-3-Clause"])
