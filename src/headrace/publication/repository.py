"""The exact tree that goes to the Hub, built from the converted model, the card's facts and the evaluation's results.

`headrace.json` in it names the fingerprint and every other file with size and sha256: whoever downloads the tree can
check it, and the next push compares itself with it. The tree passes the gate or is not there.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from headrace.artifacts.files import hash_file, link_or_copy, write_atomic, write_json
from headrace.errors import UserError
from headrace.publication import card, gate
from headrace.publication.facts import CardFacts

MANIFEST = "headrace.json"


def build_repository(
    target: Path,
    model: Path,
    facts: CardFacts,
    *,
    results: Path | None = None,
    license_file: Path | None = None,
    leave_out: Collection[str] = ("manifest.json",),
) -> list[str]:
    """Build the new folder `target` and return its files, sorted.

    `model` is the converted artifact: its files are hard-linked (copied where that is impossible), all but the names in
    `leave_out`. `results` becomes `evaluation.json`, `license_file` LICENSE. Raises `UserError` when `target` is there
    or the gate refuses; then nothing is left of it.
    """
    if target.exists():
        raise UserError(f"{target}: publish: already exists; a repository tree is never overwritten")
    try:
        _fill(target, model, facts, results, license_file, leave_out)
        return gate.inspect(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _fill(
    target: Path,
    model: Path,
    facts: CardFacts,
    results: Path | None,
    license_file: Path | None,
    leave_out: Collection[str],
) -> None:
    target.mkdir(parents=True)
    for path in sorted(model.iterdir()):
        if path.name not in leave_out:
            if not path.is_file() or path.is_symlink():
                raise UserError(f"{path}: publish: is not an ordinary file")
            link_or_copy(path, target / path.name)
    if results is not None:
        link_or_copy(results, target / "evaluation.json")
    if license_file is not None:
        link_or_copy(license_file, target / "LICENSE")
    write_atomic(target / "README.md", card.render(facts).encode())
    scores = card.eval_result_files(facts)
    if scores:
        (target / ".eval_results").mkdir()
    for name, text in scores.items():
        write_atomic(target / ".eval_results" / name, text.encode())
    write_json(target / MANIFEST, {"schema": 1, "fingerprint": facts.fingerprint, "files": describe(target)})


def describe(folder: Path) -> dict[str, dict[str, str | int]]:
    """Size and sha256 of every file in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hash_file(path, "sha256").removeprefix("sha256:"),
        }
        for path in files
    }
