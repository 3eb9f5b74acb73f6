"""The tokenizer as evaluation uses it: text in, ids out, and the exact bytes that each id stands for.

Text is data: a document that contains the characters of `<｜end▁of▁sentence｜>` must not produce that control token.
Dropping the added tokens from a copy of tokenizer.json does that and changes no other id. Byte-level BPE spells each
byte as one printable character; inverting that table gives each id's bytes, so that any span of tokens has an exact
length in bytes, also where it cuts a character in two. Tokenizers that are not byte-level are refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from headrace.artifacts.files import read_json
from headrace.conversion.special_tokens import read_special_tokens
from headrace.errors import UserError


class TextEncoder:
    """Encodes plain text with the tokenizer artifact in `folder`; control tokens never come from text.

    `eos` is the id that ends documents; `piece_bytes[id]` is the id's length in bytes (0 for control tokens and
    for rows of the model beyond the tokenizer).

    Raises `UserError` where the folder is no tokenizer artifact for a model of `vocab_size` rows or is not byte-level.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.eos = read_special_tokens(folder, vocab_size).eos
        path = folder / "tokenizer.json"
        tree = read_json(path)
        controls = {int(token["id"]) for token in tree["added_tokens"]}
        self._plain = Tokenizer.from_str(json.dumps({**tree, "added_tokens": [], "post_processor": None}))
        self.pieces = _pieces(path, self._plain.get_vocab(), controls, vocab_size)
        self.piece_bytes = np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text, without control tokens. Raises `UserError` where they do not spell its bytes."""
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        for text, tokens in zip(texts, ids, strict=True):
            if int(self.piece_bytes[tokens].sum()) != len(text.encode("utf-8")):
                raise UserError(
                    f"tokenizer: its tokens do not spell the text that starts {text[:40]!r}; train it again"
                )
        return ids

    def decode_bytes(self, tokens: NDArray[np.int64]) -> bytes:
        """The bytes that `tokens` stand for."""
        return b"".join(self.pieces[token] for token in tokens.tolist())


def _pieces(path: Path, vocabulary: dict[str, int], controls: set[int], size: int) -> list[bytes]:
    table = _byte_of_character()
    pieces = [b""] * size
    for piece, token in vocabulary.items():
        if token in controls:
            continue
        try:
            pieces[token] = bytes(table[character] for character in piece)
        except KeyError:
            raise UserError(f"{path}: token {piece!r} is not byte-level BPE, which evaluation needs") from None
    return pieces


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet (Radford et al. 2019): printable bytes are themselves, the rest U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
