"""What is said once, before anything runs."""

from pathlib import Path

import pytest

from headrace.corpus.contamination import Item
from headrace.corpus.item_files import write_items
from headrace.stages import graph
from headrace.stages.graph import Graph

TASK = "{task: quiz, folders: [quiz], metric: acc, shots: null, passage: null, definition: %s, items: null}" % (
    "0" * 64
)


def said(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str, check: bool = True) -> str:
    (tmp_path / "text.txt").write_text("some text")
    settings = ["corpus=files", f"corpus.paths=[{tmp_path}/text.txt]", f"paths.results={tmp_path}/results", *words]
    Graph({"experiment": "tiny", "set": " ".join(settings)}, check)
    return capsys.readouterr().err


def test_evaluated_tasks_whose_items_are_not_sought_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("evaluate.tasks=[humaneval_likelihood, reasoning_gym]", f"evaluate.harness=[{TASK}]")
    no_puzzles = "corpus.contamination_tasks=[humaneval_likelihood]"
    assert said(tmp_path, capsys, words[0]) == ""
    assert said(tmp_path, capsys, *words, no_puzzles, check=False) == ""  # jobs say nothing
    line = said(tmp_path, capsys, *words, no_puzzles)
    assert line.count("\n") == 1
    assert line.startswith("evaluated, but not sought in training text: items of reasoning_gym, quiz; `headrace items`")


def test_tasks_whose_items_a_file_holds_are_sought(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_items(tmp_path / "items.jsonl", [Item("quiz/part/0", "a question")])
    setting = f"corpus.contamination_items={{path: {file.path}, sha256: {file.sha256}}}"
    assert said(tmp_path, capsys, f"evaluate.harness=[{TASK}]", setting) == ""
    other = TASK.replace("quiz", "riddles")
    assert "items of riddles;" in said(tmp_path, capsys, f"evaluate.harness=[{other}]", setting)
    (tmp_path / "items.jsonl").unlink()  # no matter for a corpus that is finished
    assert said(tmp_path, capsys, f"evaluate.harness=[{other}]", setting) == ""


def test_the_corpus_job_may_take_longer_the_more_pieces_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    words = f"corpus=files corpus.paths=[{tmp_path}/text.txt] paths.results={tmp_path}/results"
    assert Graph({"experiment": "tiny", "set": words}, False).corpus_minutes() == 120
    monkeypatch.setattr(graph, "count", lambda lock: 1_720_000)
    assert Graph({"experiment": "tiny", "set": words}, False).corpus_minutes() > 10 * 60  # what docs/data.md adds up
    rule = (Path(__file__).parents[2] / "workflow" / "rules" / "corpus.smk").read_text().partition("rule corpus:")[2]
    assert "runtime=graph.corpus_minutes()," in rule
