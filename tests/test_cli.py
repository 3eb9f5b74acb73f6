"""What `headrace` prints."""

import shlex
from pathlib import Path

import pytest

from headrace import cli
from headrace.artifacts.files import read_json
from headrace.cli import main
from headrace.config.compose import load
from headrace.stages.corpus_scans import task_items
from small_corpus import tokenized


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["plan", *words]) == 0
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


def test_the_plan_of_the_published_layout(capsys: pytest.CaptureFixture[str]) -> None:
    found = {k: v.strip() for k, v in rows(capsys, "model=v3_671b", "recipe=v3_671b", "parallel=v3").items()}
    assert found["ranks"] == "2,048 = pipeline 16 x data 128, experts shared out over 64 of these"
    assert found["pipeline schedule"].startswith("dualpipe")
    assert found["microbatches"] == "120 of 1 x 4,096 tokens"
    assert found["idle share"].startswith("3.7 %, 14 F of 374 F")  # the closed form for DualPipe
    assert found["activations at the peak"].startswith("17,")  # PP + 1
    assert found["receive buffers"].endswith(", 1.174 GB")  # 1.09 GiB


def test_each_phase_of_the_published_run_has_its_own_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=v3_671b"]) == 0
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert found == ["ramp", "main", "context_32k", "context_128k", "ramp", "context_32k", "context_128k"]


def test_what_the_docs_say_of_idle_time_is_what_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "experiment=v3_671b"])
    said = [line.rsplit("idle ", 1)[1] for line in capsys.readouterr().out.splitlines() if ", idle " in line]
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text()
    assert len(said) == 3
    assert [share for share in said if f"| {share} |" not in page] == []


def test_a_stage_of_half_a_rank_takes_half_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "parallel=dualpipe", "parallel.microbatch=1", "parallel.schedule=dualpipe_v")
    assert found["idle share"].strip().startswith("4.0 %, 1 F of 25 F")  # N (F + B) and PP - 1 idle


def test_one_process_has_no_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert "idle share" not in rows(capsys, "parallel=single")


def test_the_plan_of_a_dataset_is_of_the_tokenizer_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tokenized(
        tmp_path, ("experiment=tiny", "tracking=disabled", "corpus=files", "tokenizer.vocab_size=300",
                   "corpus.validation_fraction=0.2", "corpus.heldout_fraction=0.2"),
    )  # fmt: skip
    capsys.readouterr()
    found = rows(capsys, *words, "tokens.total=14.8e12")
    (report,) = (tmp_path / "results" / "tokenizer").glob("*/artifact/tokenizer_report.json")
    assert found["tokenizer"].strip() == f"300 ids, {read_json(report)['sha256']}"
    assert "per core-second" in found["core-hours"]
    for other in ("tokenizer.vocab_size=301", "corpus.paths=[nowhere]"):
        assert "not known" in rows(capsys, *words, "tokens.total=14.8e12", other)["core-hours"]
    assert len(list((tmp_path / "results" / "locks").glob("*.lock"))) == 1  # a plan makes none


def test_what_is_impossible_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe.batch_ramp=null", "recipe.extensions=[]"]
    assert main(["plan", "parallel=dualpipe", "parallel.microbatch=4", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("headrace plan: config: parallel.schedule=dualpipe") and said.count("\n") == 1


def test_items_that_were_written_down_are_what_the_corpus_stage_seeks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it's (1), a.jsonl"
    assert main(["items", str(path), "evaluate=offline"]) == 0
    *rows, setting = capsys.readouterr().out.splitlines()
    assert rows == ["humaneval_likelihood: 164 items", "reasoning_gym: 600 items, 100 too short"]
    (word,) = shlex.split(setting)
    override = word.removeprefix("set=")
    named = load(["experiment=tiny", "corpus.contamination_tasks=[]", override]).corpus
    default = load(["experiment=tiny"]).corpus
    one = load(["experiment=tiny", "corpus.contamination_tasks=[humaneval_likelihood]"]).corpus
    assert len(task_items(one)) == 164 and task_items(default)[:164] == task_items(one)
    assert task_items(named) == task_items(default) and len(task_items(named)) == 764
    both = load(["experiment=tiny", override]).corpus
    assert task_items(both) == task_items(named)  # each once
    assert main(["items", str(tmp_path / "none" / "items.jsonl")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["items", str(path), "evaluate.tasks=[]"]) == 2
    assert "none of the evaluation's tasks has items" in capsys.readouterr().err


def test_a_fault_of_ours_is_told_with_its_traceback_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = "hf_" + "Canary7" * 5
    monkeypatch.setenv("HF_TOKEN", canary)

    def leak(*_: object) -> str:
        raise RuntimeError(f"asked with {canary}")

    monkeypatch.setitem(cli._COMMANDS, "plan", leak)
    assert main(["plan"]) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and "headrace plan: RuntimeError: asked with" in told and canary not in told
