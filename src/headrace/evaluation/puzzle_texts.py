"""What of a generated puzzle is sought in training text.

A puzzle comes from a seed, but that seed's puzzles may have been written down somewhere. Its own words are few and
mostly numbers, which are evidence of nothing (`corpus.contamination`); the words that all of its generator's puzzles
begin or end with are in the generator's source. Neither can be sought alone. So a puzzle is its own words, with as many
of those before them, and then behind them, as make the first n-gram one that tells: it holds the whole question, or its
beginning where it is long. The right answer is part of it where nothing but "Answer:" stands between.

A puzzle that even the whole wording does not make long enough has no n-gram, and is counted as too short to be sought.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from headrace.corpus.contamination import LEAST_WORDS
from headrace.corpus.word_hashes import N

_WORD = re.compile(r"[0-9a-z]+")  # puzzles are ASCII; of other text `corpus.word_hashes` takes more


def puzzle_texts(puzzles: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(id, text) of puzzles with `id`, `generator`, `prompt`, `choices` and `label`; a generator's must be together."""
    by_generator: dict[str, list[Mapping[str, Any]]] = {}
    for puzzle in puzzles:
        by_generator.setdefault(puzzle["generator"], []).append(puzzle)
    for own in by_generator.values():
        questions = [puzzle["prompt"].split() for puzzle in own]
        begin, end = shared_ends(questions)
        for puzzle, words in zip(own, questions, strict=True):
            first, last = begin, len(words) - end
            while first > 0 and not _tells(words[first:last]):
                first -= 1
            while last < len(words) and not _tells(words[first:last]):
                last += 1
            follows = _words(words[last:]) in ([], ["answer"])
            text = [*words[first:], puzzle["choices"][puzzle["label"]]] if follows else words[first:last]
            yield puzzle["id"], " ".join(text)


def shared_ends(questions: Sequence[Sequence[str]]) -> tuple[int, int]:
    """How many words all questions begin with, and how many of the others all end with: their template."""
    begin = _alike(questions)
    return begin, _alike([words[begin:][::-1] for words in questions])


def _alike(questions: Sequence[Sequence[str]]) -> int:
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*questions, strict=False)))


def _tells(question: Sequence[str]) -> bool:
    """Whether the first words of a question are an n-gram, and not one of low entropy."""
    words = _words(question)[:N]
    return len(words) == N and len({word for word in words if not word.isdigit()}) >= LEAST_WORDS


def _words(text: Sequence[str]) -> list[str]:
    """As the search takes them: a sign is no word, and what it parts are two."""
    return _WORD.findall(" ".join(text).lower())
