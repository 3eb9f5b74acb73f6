"""A realistic corpus, tokenizer and dataset, made once: 3 MB of the standard library, as experiment=tiny has it."""

from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.corpus.build import build_corpus
from headrace.corpus.lock import build_lock
from headrace.tokens.shards import finish, make_shard, plan
from headrace.tokens.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tiny() -> Config:
    return load(["experiment=tiny"])


@pytest.fixture(scope="session")
def stdlib_corpus(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    build_corpus(tiny.corpus, build_lock(tiny.corpus), out, lambda message: None)
    return out


@pytest.fixture(scope="session")
def tokenizer_folder(tiny: Config, stdlib_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(tiny.tokenizer, stdlib_corpus, out, lambda message: None)
    return out


@pytest.fixture(scope="session")
def dataset(
    tiny: Config, stdlib_corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Read only: tests that damage it copy it first."""
    out = tmp_path_factory.mktemp("tokens")
    for unit in plan(tiny.tokens):
        make_shard(unit, stdlib_corpus, tokenizer_folder, tiny.tokens, out)
    finish(out, plan(tiny.tokens))
    return out
