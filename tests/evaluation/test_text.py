import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from evaluation_world import CONTROLS, World
from headrace.errors import UserError
from headrace.evaluation.text import TextEncoder


def test_control_tokens_never_come_from_text(world: World) -> None:
    encoder = world.encoder()
    ids = encoder.encode([f"a {CONTROLS[1]} b {CONTROLS[4]}"])[0]
    assert ids.min() >= len(CONTROLS)
    plain = Tokenizer.from_file(str(world.tokenizer / "tokenizer.json"))
    assert encoder.eos in plain.encode(f"a {CONTROLS[1]} b").ids  # the trap that this closes


def test_ordinary_text_gets_the_tokenizers_own_ids(world: World) -> None:
    encoder = world.encoder()
    plain = Tokenizer.from_file(str(world.tokenizer / "tokenizer.json"))
    texts = [text for text in world.texts if CONTROLS[1] not in text]
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert ids.tolist() == plain.encode(text).ids


def test_pieces_spell_the_text_byte_by_byte_also_across_characters(world: World) -> None:
    encoder = world.encoder()
    text = "naïve 数 日本語 \U0001f600 \x00\x7f tab\t end"
    ids = encoder.encode([text])[0]
    assert encoder.decode_bytes(ids) == text.encode()
    cuts = [encoder.decode_bytes(ids[:cut]) for cut in range(len(ids) + 1)]
    assert [len(cut) for cut in cuts] == np.concatenate([[0], np.cumsum(encoder.piece_bytes[ids])]).tolist()
    assert encoder.piece_bytes[encoder.eos] == 0


def test_a_tokenizer_that_changes_text_is_refused(world: World, tmp_path: Path) -> None:
    tree = json.loads((world.tokenizer / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text((world.tokenizer / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**tree, "normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}})
    )
    with pytest.raises(UserError, match="do not spell the text"):
        TextEncoder(tmp_path, world.config.vocab_size).encode(["  padded  "])
    tree["model"]["vocab"]["字"] = 399
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="not byte-level"):
        TextEncoder(tmp_path, world.config.vocab_size)
