"""A tokenized dataset as a data set repository: one view of its shards, a card with sources and licences, its hashes.

    README.md                          the card, from computed facts
    data/train-00000-of-00008.arrow    view `arrow`: a row a document, for `datasets`
    data/<shard>.bin, .idx             view `megatron`: the shards as they are, in hard links, and dataset.json
    tokenizer.json                     what the ids are of
    headrace.json                      every file with size and sha256

Shards may be many, so it goes to the Hub through a pull request (`hub.DATASET`) and appears there whole.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import DatasetCardData

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import link_or_copy, read_json, write_atomic, write_json
from headrace.errors import UserError
from headrace.publication import card
from headrace.publication.card_checks import SIZES
from headrace.publication.facts import DataSource
from headrace.publication.gate import inspect_dataset
from headrace.publication.repository import MANIFEST, describe
from headrace.tokens.export import TOKENIZER, export

View = Literal["arrow", "megatron"]


@dataclass(frozen=True)
class DatasetFacts:
    """What the card of a token data set says beside what the data set says of itself."""

    title: str
    license: str  # an SPDX identifier, or 'other'
    repo_id: str | None
    model: str | None  # the model's repository, whose tokenizer this is
    fingerprint: str  # of the tokens and of what is said of them; the tag under which the repository is found again
    view: View
    sources: Sequence[DataSource]
    versions: Mapping[str, str]
    code_version: str
    command: str


def build_dataset(target: Path, tokens: Path, facts: DatasetFacts) -> list[str]:
    """Build the new folder `target` from a tokenize artifact and return its files, sorted.

    Raises `UserError` when `target` is there, the artifact is damaged or the gate refuses; then nothing is left of it.
    """
    if target.exists():
        raise UserError(f"{target}: publish: already exists; a repository tree is never overwritten")
    try:
        if facts.view == "arrow":
            export(tokens, target, "arrow")
            (target / "export.json").unlink()  # it says where the view lay on this machine
        else:
            _link_shards(target, tokens)
        write_atomic(target / "README.md", _card(tokens, facts).encode())
        write_json(target / MANIFEST, {"schema": 1, "fingerprint": facts.fingerprint, "files": describe(target)})
        return inspect_dataset(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _link_shards(target: Path, tokens: Path) -> None:
    manifest = manifests.verify(tokens)
    (target / "data").mkdir(parents=True)
    for name in manifest.files:
        if name.endswith((".bin", ".idx")):
            link_or_copy(tokens / name, target / "data" / name)
    for name in ("dataset.json", TOKENIZER):
        if name in manifest.files:
            link_or_copy(tokens / name, target / name)


def _card(tokens: Path, facts: DatasetFacts) -> str:
    described = read_json(tokens / "dataset.json")
    splits = [
        {"name": name} | {key: sum(shard[key] for shard in held["shards"]) for key in ("documents", "tokens")}
        for name, held in described["splits"].items()
    ]
    documents = sum(split["documents"] for split in splits)
    files = [{"split": split["name"], "path": f"data/{split['name']}-*.arrow"} for split in splits if split["tokens"]]
    head = DatasetCardData(
        license=facts.license.lower(),
        license_name="see-sources" if facts.license == "other" else None,
        pretty_name=f"{facts.title}: tokens",
        task_categories=["text-generation"],
        tags=["headrace", "tokenized"],
        size_categories=[SIZES[min(max(len(str(documents)) - 3, 0), len(SIZES) - 1)]],
        configs=[{"config_name": "default", "data_files": files}] if facts.view == "arrow" else None,
    )
    source = facts.repo_id or "path/to/this/folder"
    values = {"splits": splits, "eos": described["eos"], "tokenizer": described["tokenizer"], "source": source}
    return card.filled("dataset.md.jinja", head, vars(facts) | values)
