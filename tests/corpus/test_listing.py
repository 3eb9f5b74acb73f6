"""The user's files: names are the words that were given, groups are second-level directories below them."""

from pathlib import Path

import pytest

from headrace.corpus.listing import list_user_files
from headrace.errors import UserError

FILES = ("top.txt", "a/one.txt", "a/b/two.txt", "a/b/c/three.txt", "d/b/c/four.txt", ".git/five.txt", "a/.six.txt")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("data", name).write_text("text")


def groups(*paths: str) -> dict[str, str]:
    return {file.name: file.group for file in list_user_files(paths)}


@pytest.mark.parametrize(("entry", "root"), [("data", "data"), ("data/", "data"), ("data/**/*.txt", "data")])
def test_a_folder_is_grouped_by_its_second_level(entry: str, root: str) -> None:
    assert groups(entry) == {
        "data/a/b/c/three.txt": f"{root}/a/b",
        "data/a/b/two.txt": f"{root}/a/b",
        "data/a/one.txt": f"{root}/a",
        "data/d/b/c/four.txt": f"{root}/d/b",
        "data/top.txt": "data/top.txt",
    }


@pytest.mark.parametrize("entry", [".", "**/*.txt"])
def test_the_working_folder_is_a_root_too(entry: str) -> None:
    assert groups(entry)["data/a/b/c/three.txt"] == groups(entry)["data/a/one.txt"] == "./data/a"


def test_single_files_and_absolute_paths(tmp_path: Path) -> None:
    assert groups("data/a/one.txt", "data/top.txt") == {
        "data/a/one.txt": "data/a/one.txt",
        "data/top.txt": "data/top.txt",
    }
    assert groups(str(tmp_path / "data"))[f"{tmp_path}/data/a/b/two.txt"] == f"{tmp_path}/data/a/b"


def test_a_name_with_glob_characters_is_taken_as_it_is() -> None:
    Path("data/odd[1].txt").write_text("text")
    assert groups("data/odd[1].txt") == {"data/odd[1].txt": "data/odd[1].txt"}


def test_names_that_cannot_be_written_down_are_refused() -> None:
    Path("data/two\nlines.txt").write_text("text")
    with pytest.raises(UserError, match="is not a printable UTF-8 name") as refusal:
        list_user_files(["data"])
    assert "\n" not in str(refusal.value)
