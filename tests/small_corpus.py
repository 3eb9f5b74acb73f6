"""A corpus of no size, tokenized through the stages' own doors, for tests of the stages that follow."""

from collections.abc import Sequence
from pathlib import Path

from headrace.stages import corpus, tokenize, tokenizer
from headrace.stages.run import main


def write_texts(folder: Path) -> None:
    """20 texts in the new folder `texts` of `folder`."""
    (folder / "texts").mkdir()
    for name in range(20):
        (folder / "texts" / f"{name}.txt").write_text(" ".join(f"word{(name * i) % 97}" for i in range(400)))


def tokenized(folder: Path, settings: Sequence[str]) -> list[str]:
    """`settings` with 20 texts as their corpus and a finished tokenize stage; the last word says where results lie."""
    write_texts(folder)
    words = [*settings, f"corpus.paths=[{folder}/texts]", f"paths.results={folder}/results"]
    for stage in (corpus, tokenizer, tokenize):
        assert main(stage.DOOR, words) == 0
    return words
