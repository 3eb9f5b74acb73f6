"""The table of stages: what each reads, its parents, its version; and the fingerprints that follow from it.

A stage's fingerprint is the hash of (name, version, its slice of the configuration, its parents' fingerprints), so a
changed value gives a new folder for that stage and everything after it, and an old value finds its old folder again.
Raise `version` when a stage's meaning changes: that reruns it and what follows, as no edit of code or format does.
What was requested is hashed, never what `auto` resolved to. This module imports nothing heavy: the Snakefile reads it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.artifacts.files import hash_file
from headrace.config.addresses import is_address, repository
from headrace.config.compose import to_dict
from headrace.config.schema import Config
from headrace.errors import UserError

MACHINE_GROUPS = ("parallel", "launch", "checkpoint", "tracking", "paths")
"""Groups that describe the machine; no stage may hash them, every stage may read them."""


@dataclass(frozen=True)
class Stage:
    """One row: `keys` are the configuration groups it reads, `parents` the stages whose artifacts it reads."""

    name: str
    keys: tuple[str, ...]
    parents: tuple[str, ...]
    version: int


STAGES: tuple[Stage, ...] = (
    Stage("corpus", keys=("corpus",), parents=(), version=4),
    Stage("tokenizer", keys=("tokenizer",), parents=("corpus",), version=1),
    Stage("tokenize", keys=("tokens",), parents=("corpus", "tokenizer"), version=3),
    Stage("pretrain", keys=("model", "precision", "recipe", "train", "seed"), parents=("tokenize",), version=3),
    Stage("convert", keys=("convert",), parents=("tokenizer", "pretrain"), version=2),
    Stage(
        "evaluate", keys=("evaluate",), parents=("corpus", "tokenizer", "tokenize", "pretrain", "convert"), version=2
    ),
    Stage(
        "publish",
        keys=("publish",),
        parents=("corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate"),
        version=1,
    ),
    Stage("precision_study", keys=("model", "recipe", "train", "seed", "study"), parents=("tokenize",), version=1),
    Stage(
        "report",
        keys=(),
        parents=("corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate", "publish"),
        version=5,
    ),
)

NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """The row of one stage."""
    return next(stage for stage in STAGES if stage.name == name)


def parents_of(stage: Stage, config: Config) -> tuple[str, ...]:
    """The stage's parents under `config`: the report reads the precision study where `study.in_report` says so."""
    studied = ("precision_study",) if stage.name == "report" and config.study.in_report else ()
    return (*stage.parents, *studied)


def readable_groups(stage: Stage, config: Config) -> frozenset[str]:
    """Groups whose values the stage's fingerprint covers, its ancestors' included, and the machine's."""
    groups = {*stage.keys, *MACHINE_GROUPS}
    for parent in parents_of(stage, config):
        groups |= readable_groups(stage_named(parent), config)
    return frozenset(groups)


def slices(config: Config, sources: str) -> dict[str, dict[str, Any]]:
    """For every stage what is hashed: name, version, the values of its groups, its parents' fingerprints.

    `sources` is the hash of the corpus' lock; it is part of the corpus stage's slice.
    """
    tree = to_dict(config)
    if not config.train.mask_documents:
        del tree["train"]["mask_documents"]  # a run without it is what it was before there was this switch
    result: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        values = {key: tree[key] for key in stage.keys}
        if stage.name == "corpus":
            values["sources"] = sources
            if config.corpus.contamination_items:
                del values["corpus"]["contamination_items"]["path"]  # the hash names the content
        if stage.name == "tokenizer" and is_address(config.tokenizer.path):
            repository(config.tokenizer.path)  # names a commit, and that its content
        elif stage.name == "tokenizer" and config.tokenizer.path:
            values["sources"] = tokenizer_files(Path(config.tokenizer.path))
        if stage.name == "precision_study":
            del values["study"]["in_report"]  # it says who reads the study, not what the study is
        result[stage.name] = {
            "stage": stage.name,
            "version": stage.version,
            "config": values,
            "parents": {parent: fingerprint(result[parent]) for parent in parents_of(stage, config)},
        }
    return result


def tokenizer_files(path: Path) -> dict[str, str]:
    """Hashes of a tokenizer.json and of the tokenizer_config.json beside it: the path alone names no content."""
    if not path.is_file():
        raise UserError(f"tokenizer.path={path}: no such file")
    files = [path, path.with_name("tokenizer_config.json")]
    return {file.name: hash_file(file, "sha256") for file in files if file.is_file()}


def fingerprint(stage_slice: dict[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of a slice in canonical JSON."""
    canonical = json.dumps(stage_slice, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def fingerprints(config: Config, sources: str) -> dict[str, str]:
    """The fingerprint of every stage."""
    return {name: fingerprint(stage_slice) for name, stage_slice in slices(config, sources).items()}
