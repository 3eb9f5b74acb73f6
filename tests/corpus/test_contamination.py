"""Contamination: an item is found where it is quoted, and not where a phrase or a run of numbers is shared."""

import random
import subprocess
import sys

from headrace.corpus.contamination import Findings, Item, Items

generator = random.Random(0)
VOCABULARY = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti") for b in ("ban", "cel", "dor", "fit", "gam")
]


def prose(words: int) -> str:
    return " ".join(generator.choice(VOCABULARY) + str(generator.randrange(1000)) for _ in range(words))


def test_a_quoted_item_is_found_whatever_case_and_punctuation() -> None:
    questions = [prose(40) for _ in range(50)]
    items = Items([Item(f"q/{number}", question) for number, question in enumerate(questions)])
    assert items.grams.tolist() == [28] * 50
    documents = [prose(3000) for _ in range(20)]
    documents[7] += " " + questions[3].upper().replace(" ", ", ") + " " + prose(50)
    documents[11] = questions[4] + documents[11] + " " + questions[49]
    found = items.search(documents)
    assert [(match.document, match.item, match.grams) for match in found] == [
        (7, "q/3", 28),
        (11, "q/4", 27),
        (11, "q/49", 28),
    ]


def test_half_of_the_grams_or_two_disjoint_hits() -> None:
    question = prose(60).split()  # 48 n-grams
    items = Items([Item("q", " ".join(question))])

    def found(*parts: tuple[int, int]) -> bool:
        text = " ".join(" ".join(question[begin:end]) + " " + prose(20) for begin, end in parts)
        return bool(items.search([prose(100) + " " + text]))

    assert not found((0, 25))  # 13 n-grams, all overlapping in word 12
    assert found((0, 26))  # two that share no word
    assert not found((3, 16)) and found((3, 16), (30, 43))
    short = Items([Item("s", " ".join(question[:16]))])  # 4 n-grams
    text = " ".join(question[:14])  # 2 of them
    assert [match.share for match in short.search([text])] == [0.5]
    assert not short.search([" ".join(question[:13])])


def test_a_long_item_is_judged_as_a_short_one() -> None:
    """Longer than what is searched at once: thirteen n-grams that overlap are too few wherever they stand."""
    question = prose(20_000).split()
    assert len(" ".join(question)) > 1 << 17
    items = Items([Item("q", " ".join(question))])
    assert items.search([" ".join(question[begin : begin + 25]) for begin in range(len(question) - 25)]) == []
    assert len(items.search([" ".join(question[begin : begin + 26]) for begin in range(0, 19_000, 500)])) == 38


def test_low_entropy_is_no_evidence() -> None:
    numbers = " ".join(str(number) for number in range(100))
    loop = "for i in range 10 x x x x x x x " * 5
    items = Items([Item("numbers", numbers), Item("loop", loop), Item("short", "what is it")])
    assert items.grams.tolist() == [0, 0, 0]
    assert items.search([numbers, loop, "what is it"]) == []


def test_batches_do_not_matter() -> None:
    question = prose(30)
    items = Items([Item("q", question)])
    texts = [prose(2000) for _ in range(30)] + [question] + [prose(5)] * 3
    whole = items.search(texts)
    assert [match.document for match in whole] == [30]
    assert [match.document for text in texts for match in items.search([text])] == [0]


def test_a_long_document_is_one_document_and_what_is_found_in_all_of_it_is_added_up() -> None:
    question = prose(60).split()
    items = Items([Item("q", " ".join(question)), Item("far", prose(30))])
    filler = prose(30_000)  # 250 KB: several slices
    text = " ".join([*question[3:16], filler, *question[30:43], filler])  # two n-grams that share no word, far apart
    assert [(match.document, match.item, match.grams) for match in items.search(["x", text, "y"])] == [(1, "q", 2)]
    assert not items.search([" ".join([*question[3:16], filler, *question[3:16]])])
    words = filler.split()
    for place in range(7_000, 8_400, 7):  # wherever a slice ends
        found = items.search([" ".join([*words[:place], *question[:26], *words[place:14_000]])])
        assert [(match.item, match.grams) for match in found] == [("q", 14)]


def test_memory_does_not_grow_with_a_document() -> None:
    code = (
        "import resource; from headrace.corpus.contamination import Item, Items; "
        "items = Items([Item('q', ' '.join(f'word{n}' for n in range(30)))]); "
        "items.search(['some words of a text ' * 10_000]); "
        "text = 'some words of a text ' * 1_000_000; "  # 21 MB
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; items.search([text]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64_000  # KiB; it was a gigabyte


def test_findings_add_up_and_the_hash_is_of_the_items() -> None:
    findings = Findings()
    findings.add("b", 2, 0.5)
    findings.add("a", 1, 1.0)
    findings.add("b", 1, 0.75)
    assert findings.table() == {"a": {"documents": 1, "share": 1.0}, "b": {"documents": 3, "share": 0.75}}
    one, two = Item("1", "x"), Item("2", "y")
    assert Items([one, two]).hash == Items([two, one]).hash != Items([one]).hash
