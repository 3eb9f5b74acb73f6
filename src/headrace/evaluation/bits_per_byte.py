"""Bits per byte on held-out text, by kind of text and overall, for the network and its baselines on the same targets.

    bits per byte = sum of -log2 p(target | context) / UTF-8 bytes of the targets

which compares models with different tokenizers, unlike loss per token. All models get the rows of `heldout` and their
rule for context; intervals are from a bootstrap over documents; the network and an n-gram model are compared by their
difference per document, which is far more certain than either figure alone. xz gets the same bytes in one piece
(`compressors`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.evaluation import ngrams
from headrace.evaluation.compressors import xz_bits_per_byte
from headrace.evaluation.heldout import Heldout
from headrace.evaluation.scorer import Scorer, score_rows
from headrace.evaluation.statistics import ratio_of_sums
from headrace.evaluation.text import TextEncoder

Floats = NDArray[np.float64]

MODEL, XZ = "model", "xz -9"
OVERALL = "all"
CONVENTION = (
    "rows of at most {length} targets; a row's first target is predicted from one token, the end-of-sentence token for "
    "a document's first row and the token before it for the others; the end-of-sentence token at a document's end is "
    "not counted; the same rows and contexts for all models; xz compresses the same text in one piece per kind"
)


def network_bits(scorer: Scorer, heldout: Heldout, vocab_size: int) -> Floats:
    """Bits of each document's scored targets [D] under a network."""
    return _bits(heldout, score_rows(scorer, heldout.tokens, heldout.lengths, vocab_size))


def ngram_bits(models: Mapping[int, ngrams.NGramModel], heldout: Heldout) -> dict[str, Floats]:
    """Bits of each document's scored targets [D] under the unigram, bigram and trigram models, by name."""
    return {
        name: _bits(heldout, ngrams.score(dict(models), order, heldout.tokens)) for order, name in ngrams.NAMES.items()
    }


def summarise(
    bits: Mapping[str, Floats], heldout: Heldout, encoder: TextEncoder, resamples: int, seed: int
) -> dict[str, Any]:
    """Estimates by kind and model, and paired differences of the model and each other entry of `bits`.

    bits: per document [D], by name; `MODEL` must be among them. A difference below zero means that the model is
    better.
    """
    sizes = heldout.per_document(heldout.sizes)
    kinds: dict[str, Any] = {}
    for kind in [OVERALL, *heldout.kinds]:
        chosen = heldout.of_kind(kind) if kind != OVERALL else np.ones(len(sizes), dtype=bool)
        text = heldout.text(encoder, None if kind == OVERALL else kind)
        size, tokens = sizes[chosen], heldout.per_document(heldout.lengths)[chosen].sum()
        own = bits[MODEL][chosen]
        models = {name: ratio_of_sums(b[chosen], size, resamples, seed).to_json() for name, b in bits.items()}
        models[XZ] = {"value": xz_bits_per_byte(text), "low": None, "high": None, "units": 1}
        kinds[kind] = {
            "documents": int(chosen.sum()),
            "tokens": int(tokens),
            "bytes": len(text),
            "models": models,
            "paired": {
                name: ratio_of_sums(own - b[chosen], size, resamples, seed).to_json()
                for name, b in bits.items()
                if name != MODEL
            },
            "nats_per_token": {name: float(b[chosen].sum() * np.log(2) / tokens) for name, b in bits.items()},
        }
    return {
        "convention": CONVENTION.format(length=heldout.tokens.shape[1] - 1),
        "rows": len(heldout.tokens),
        "kinds": kinds,
    }


def _bits(heldout: Heldout, scores: Floats) -> Floats:
    """Per-target natural log-probabilities [N, L] to bits per document [D]."""
    per_row = np.where(heldout.mask, -scores, 0.0).sum(axis=1) / np.log(2)
    return heldout.per_document(per_row)
