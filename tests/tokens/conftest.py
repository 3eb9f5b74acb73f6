"""A realistic corpus, tokenizer and dataset, made once: 3 MB of the standard library, as experiment=tiny has it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.corpus.build import build_corpus
from headrace.corpus.lock import Lock, build_lock
from headrace.stages.token_units import Documents, encoder_of, units_of
from headrace.tokens.plan import Unit
from headrace.tokens.shards import finish, make_shard
from headrace.tokens.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tiny() -> Config:
    return load(["experiment=tiny"])


@pytest.fixture(scope="session")
def lock(tiny: Config) -> Lock:
    return build_lock(tiny.corpus)


@pytest.fixture(scope="session")
def stdlib_corpus(tiny: Config, lock: Lock, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    build_corpus(replace(tiny.corpus, contamination_tasks=()), lock, out, lambda message: None)
    return out


@pytest.fixture(scope="session")
def tokenizer_folder(tiny: Config, stdlib_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(tiny.tokenizer, stdlib_corpus, out, lambda message: None)
    return out


@dataclass(frozen=True)
class Work:
    """The units of tiny's dataset, and how each is made."""

    units: list[Unit]
    corpus: Path
    tokenizer: Path
    lock: Lock
    config: Config

    def make(self, unit: Unit, out: Path, *, quick: bool = False, **changes: Any) -> dict[str, Any]:
        """Make one shard, with some settings of `tokens` changed."""
        config = replace(self.config.tokens, **changes)
        documents = Documents(self.corpus, self.lock, self.config).of(unit)
        return make_shard(unit, documents, encoder_of(self.tokenizer, config), config, out, quick=quick)


@pytest.fixture(scope="session")
def work(tiny: Config, lock: Lock, stdlib_corpus: Path, tokenizer_folder: Path) -> Work:
    return Work(units_of(stdlib_corpus, tokenizer_folder, lock, tiny), stdlib_corpus, tokenizer_folder, lock, tiny)


@pytest.fixture(scope="session")
def dataset(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: tests that damage it copy it first."""
    out = tmp_path_factory.mktemp("tokens")
    for unit in work.units:
        work.make(unit, out)
    finish(out, work.units)
    return out
