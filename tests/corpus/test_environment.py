"""The environment corpus: what is taken, what is refused, and that its names do not tell where it lies."""

import json
import shutil
from pathlib import Path

import pytest

from headrace.corpus.environment import distributions, english_topics, kind_of, list_environment
from headrace.errors import UserError

ALLOW = ["MIT", "Apache-2.0"]


def install(
    site: Path, name: str, licence: str, files: dict[str, str], direct_url: dict[str, object] | None = None
) -> None:
    """A distribution as pip leaves it: files, dist-info with METADATA and RECORD."""
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n",
        f"{info}/INSTALLER": "pip\n",
        f"{info}/licenses/LICENSE.txt": "Permission is hereby granted\n",
    }
    if direct_url:
        files[f"{info}/direct_url.json"] = json.dumps(direct_url)
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    record = [*files, f"{info}/RECORD", "../../bin/tool.py", f"{name}/__pycache__/a.cpython-311.pyc", f"{name}/gone.py"]
    (site / info / "RECORD").write_text("".join(f"{path},,\n" for path in record))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "venv/lib/site-packages"
    install(
        folder, "Good_Package", "MIT", {"good/a.py": "a = 1\n", "good/sub/deep/b.h": "int b;\n", "good/data.bin": "x"}
    )
    install(folder, "copyleft", "GPL-3.0-only", {"copyleft/a.py": "a = 1\n"})
    install(folder, "edited", "MIT", {"edited/a.py": "a"}, {"url": "file:///src", "dir_info": {"editable": True}})
    install(folder, "headrace", "Apache-2.0", {"headrace/a.py": "a = 1\n"})
    return folder


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    folder = tmp_path / "python/lib"
    for name in (
        "abc.py",
        "json/decoder.py",
        "_sysconfigdata__linux.py",
        "config-3.11/config.c",
        "site-packages/x.py",
        "json/__pycache__/x.py",
        "lib-dynload/x.txt",
        "LICENSE.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text\n")
    return folder


def test_only_licensed_packages_and_text_that_no_installer_writes(site: Path, stdlib: Path) -> None:
    names = [file.name for file in list_environment(True, ALLOW, stdlib, site)]
    assert names == [
        "packages/good-package/Good_Package-1.0.dist-info/METADATA",
        "packages/good-package/good/a.py",
        "packages/good-package/good/sub/deep/b.h",
        "stdlib/abc.py",
        "stdlib/json/decoder.py",
    ]
    assert all(file.name.startswith("stdlib/") for file in list_environment(False, ALLOW, stdlib, site))


def test_refusals_have_reasons(site: Path) -> None:
    refused = {each.name: each.refused for each in distributions(ALLOW, site)}
    assert refused == {
        "good-package": None,
        "copyleft": "licence not allowed: GPL-3.0-only",
        "edited": "installed for editing",
        "headrace": "installed for editing",
    }


def test_names_and_groups_do_not_depend_on_the_place(site: Path, stdlib: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere/site-packages"
    shutil.copytree(site, other)
    first, second = (list_environment(True, ALLOW, stdlib, place) for place in (site, other))
    assert [(file.name, file.group) for file in first] == [(file.name, file.group) for file in second]
    assert first[0].path != second[0].path
    groups = {file.name: file.group for file in first}
    assert groups["packages/good-package/good/sub/deep/b.h"] == "packages/good-package/good/sub"
    assert groups["stdlib/json/decoder.py"] == "stdlib/json"
    assert groups["stdlib/abc.py"] == "stdlib/abc.py"


def test_kinds() -> None:
    kinds = {
        name: kind_of(name) for name in ("a.py", "a.cu", "a.hpp", "a.rst", "x.dist-info/METADATA", "a.txt", "a.so")
    }
    assert list(kinds.values()) == ["code", "code", "header", "docs", "docs", "text", None]


def test_the_english_book_is_prose_without_the_python_around_it() -> None:
    import pydoc_data.topics

    source = Path(pydoc_data.topics.__file__).read_text()
    topics = dict(english_topics(source, "topics.py"))
    assert topics == pydoc_data.topics.topics
    assert topics["assert"].startswith('The "assert" statement')
    with pytest.raises(UserError, match=r"topics\.py: holds no dictionary"):
        list(english_topics("import os\n", "topics.py"))


def test_this_environment_takes_the_standard_library_and_not_headrace() -> None:
    names = [file.name for file in list_environment(True, ["MIT", "BSD-3-Clause"])]
    assert {"stdlib/argparse.py", "stdlib/pydoc_data/topics.py"} <= set(names)
    assert any(name.startswith("packages/pytest/") for name in names)
    assert not any(name.startswith("packages/headrace/") for name in names)
