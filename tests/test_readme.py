"""The README keeps what it says: files that it links exist, commands that it shows are understood."""

import re
import shlex
from pathlib import Path

import pytest

from headrace.config.compose import load, overrides_from

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_shown_compose(page: Path) -> None:
    for line in page.read_text().splitlines():
        if not line.startswith(("    snakemake", "    python -m headrace", "    headrace")):
            continue
        words = shlex.split(line, comments=True)
        if "--config" in words:
            pairs = dict(word.split("=", 1) for word in words[words.index("--config") + 1 :])
            load(overrides_from(pairs))
        elif words[:3] and ((words[0] == "python" and "-m" in words) or words[:2] == ["headrace", "plan"]):
            # Words of a program itself name what it works on; they are no settings.
            load([word for word in words if "=" in word and not word.startswith(("source=", "runs="))])


def test_targets_of_make_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"make ([a-z]+(?:-[a-z]+)*)", page.read_text())}
    assert named & {"run", "test"} == {"run", "test"}
    assert {name for name in named if name not in targets and name in {"run", "test", "lint", "format"}} == set()
