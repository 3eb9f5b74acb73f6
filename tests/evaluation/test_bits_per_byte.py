import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation_world import LENGTH, World
from headrace.evaluation import bits_per_byte, ngrams
from headrace.evaluation.compressors import xz_bits_per_byte
from headrace.evaluation.heldout import Heldout, read
from headrace.evaluation.scorer import TransformersScorer


class Uniform:
    """A scorer that finds all tokens equally likely."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        return torch.full((tokens.shape[0], tokens.shape[1] - 1), -np.log(self.vocabulary), dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(world: World) -> Heldout:
    return read(world.heldout, world.encoder(), LENGTH, 60)


def test_a_uniform_model_costs_log2_of_the_vocabulary_per_token(world: World, rows: Heldout) -> None:
    bits = {"model": bits_per_byte.network_bits(Uniform(256), rows, world.config.vocab_size)}
    summary = bits_per_byte.summarise(bits, rows, world.encoder(), 200, 0)
    for entry in summary["kinds"].values():
        assert entry["models"]["model"]["value"] == pytest.approx(8 * entry["tokens"] / entry["bytes"], rel=1e-6)
        assert entry["nats_per_token"]["model"] == pytest.approx(np.log(256), rel=1e-6)
    assert 0 < summary["kinds"]["all"]["models"]["model"]["value"] < 8


def test_every_figure_equals_the_plain_sum_over_its_own_tokens(world: World, rows: Heldout) -> None:
    """Document by document and token by token, without batches, masks or bincount."""
    scorer = TransformersScorer.load(world.hub)
    models = ngrams.fit(world.rows, world.config.vocab_size)
    bits = {"model": bits_per_byte.network_bits(scorer, rows, world.config.vocab_size)}
    bits |= bits_per_byte.ngram_bits(models, rows)
    encoder = world.encoder()
    summary = bits_per_byte.summarise(bits, rows, encoder, 200, 0)
    for kind in ("all", "code", "docs"):
        spent, size, text = {"model": 0.0, "bigram": 0.0}, 0, b""
        for row, owner in enumerate(rows.owner):
            if kind not in ("all", rows.documents[owner].kind):
                continue
            tokens = rows.tokens[row, : 1 + rows.lengths[row]]
            spent["model"] -= float(scorer.log_probabilities(torch.from_numpy(tokens[None])).double().sum())
            spent["bigram"] -= float(models[2].log_probabilities(tokens[None]).sum())
            text += encoder.decode_bytes(tokens[1:])
            size = len(text)
        entry = summary["kinds"][kind]
        assert entry["bytes"] == size
        for name, nats in spent.items():
            assert entry["models"][name]["value"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
        assert entry["models"]["xz -9"]["value"] == xz_bits_per_byte(text)
        difference = entry["models"]["model"]["value"] - entry["models"]["bigram"]["value"]
        assert entry["paired"]["bigram"]["value"] == pytest.approx(difference)
        assert entry["paired"]["bigram"]["low"] < difference < entry["paired"]["bigram"]["high"]
    counted = summary["kinds"]
    assert counted["all"]["documents"] == counted["code"]["documents"] + counted["docs"]["documents"]


def test_ngrams_that_saw_the_text_beat_a_random_network(world: World, rows: Heldout) -> None:
    models = ngrams.fit(world.rows, world.config.vocab_size)
    bits = bits_per_byte.ngram_bits(models, rows)
    bits["model"] = bits_per_byte.network_bits(TransformersScorer.load(world.hub), rows, world.config.vocab_size)
    paired = bits_per_byte.summarise(bits, rows, world.encoder(), 300, 0)["kinds"]["all"]["paired"]
    assert paired["bigram"]["low"] > 0  # the model is worse, beyond doubt
