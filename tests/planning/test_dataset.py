"""What a dataset takes: the published 14.8T tokens in figures to check by hand, and a speed that is measured."""

from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.planning.dataset import Speed, dataset_rows, measure
from small_corpus import tokenized

TOTAL = 14_800_000_000_000


def test_the_published_amount_is_6892_shards_and_59_terabytes() -> None:
    config = load(
        [f"tokens.total={TOTAL}", "tokens.row_lengths=[4096]", "recipe.sequence_length=4096", "recipe.extensions=[]",
         "model.max_position_embeddings=4096"]
    )  # fmt: skip
    rows = dict(dataset_rows(config, TOTAL, Speed(5e6, 4.0, 16_000_000, "129,280 ids")))
    assert rows["token shards"] == "6,892 of 2.147 G tokens, and 2 of validation and held-out text"
    # 296 GB of documents' ends and 29 GB of rows' starts
    assert rows["token files"] == "59.2 TB of ids, 324.9 GB of indices (at 1,000 tokens a document)"
    assert rows["text"] == "59.2 TB at 4.00 bytes a token"
    assert rows["jobs"].startswith("2,078: 925 of 2,000 pieces to scan, 1,149 of 6 shards")
    assert rows["core-hours"].startswith("822 at 5 M tokens per core-second")
    assert rows["scan core-hours"].startswith("235 to 365 at 70 to 45 MB/s, not measured here")
    assert rows["tokenizer"] == "129,280 ids"


def test_without_a_tokenizer_the_speed_is_said_to_be_unknown() -> None:
    rows = dict(dataset_rows(load([f"tokens.total={TOTAL}"]), TOTAL, None))
    assert "run `snakemake tokenizer` once" in rows["core-hours"]


def test_the_speed_is_measured_on_the_sample(tmp_path: Path) -> None:
    words = tokenized(
        tmp_path,
        ("experiment=tiny", "tracking=disabled", "corpus=files", "tokenizer.vocab_size=300",
         "corpus.validation_fraction=0.2", "corpus.heldout_fraction=0.2"),
    )  # fmt: skip
    latest = tmp_path / "results" / "latest"
    corpus, tokenizer = latest / "corpus" / "artifact", latest / "tokenizer" / "artifact"
    speed = measure(corpus, tokenizer, load(words))
    assert speed.tokens_per_second > 1000
    assert 1 < speed.bytes_per_token < 8
    assert speed.bytes == pytest.approx(sum(p.stat().st_size for p in (tmp_path / "texts").iterdir()) * 0.6, rel=0.2)
