"""No folder of the machine is left in what others read, and nothing else is changed."""

import pytest

from headrace.publication.local_paths import base_name, without_folders


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("tokenizer.path=/home/alice/v3/tokenizer.json", "tokenizer.path=tokenizer.json"),
        ("tokenizer.path=/home/al ice/tok.json", "tokenizer.path=tok.json"),
        ("tokenizer.path=~/v3/tokenizer.json", "tokenizer.path=tokenizer.json"),
        ("tokenizer.path='/home/al, ice/it\\'s/tok.json'", "tokenizer.path='tok.json'"),
        ('tokenizer.path="/home/alice/tok.json"', 'tokenizer.path="tok.json"'),
        (r"tokenizer.path=/home/al\,ice/tok.json", "tokenizer.path=tok.json"),
        ("corpus.paths=[/home/alice/a.jsonl, /srv/b/*.txt,data/c]", "corpus.paths=[a.jsonl, *.txt,data/c]"),
        ("corpus.paths=['/home/alice/a b/',file:///srv/b]", "corpus.paths=['a b',b]"),
        ("corpus.sources=[{name:a,paths:[/home/alice/x]}]", "corpus.sources=[{name:a,paths:[x]}]"),
        (
            "+corpus.contamination_items={path: /home/alice/i.jsonl, sha256: ab}",
            "+corpus.contamination_items={path: i.jsonl, sha256: ab}",
        ),
        ("corpus.paths=[//server/share/alice]", "corpus.paths=[alice]"),
    ],
)
def test_absolute_paths_are_shown_by_their_base_names(override: str, shown: str) -> None:
    assert without_folders(override) == shown


@pytest.mark.parametrize(
    "override",
    [
        "experiment=demo",
        "recipe.tokens=1e6",
        "corpus.paths=[data/*.jsonl,hf://datasets/me/it,s3://bucket/a/b,datasets://a/b]",
        "publish.title='A/B: one / two'",
        "publish.repo_id=me/it",
        "train.from=0123456789ab@10",
        "~corpus",
    ],
)
def test_what_is_no_absolute_path_stays(override: str) -> None:
    assert without_folders(override) == override


def test_a_name_alone() -> None:
    assert [base_name(name) for name in ("/home/alice/texts", "stdlib", "packages/numpy", "hf://datasets/a/b")] == [
        "texts",
        "stdlib",
        "packages/numpy",
        "hf://datasets/a/b",
    ]
