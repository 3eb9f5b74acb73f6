"""Batches: every unit in one of them, and batches that lead nowhere stop."""

import re
from pathlib import Path

import pytest
from snakemake.io import regex_from_filepattern

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.launch.deadline import StopRequested
from headrace.stages import batches, corpus_scans, tokenize_shards
from headrace.stages.batch_names import batch_names
from headrace.stages.batches import batch_of
from headrace.stages.graph import Graph
from headrace.stages.tokenize_plan import BATCHES


@pytest.mark.parametrize("per_job", [1, 2, 3, 4, 100])
def test_every_unit_is_in_one_batch(per_job: int) -> None:
    units = list(range(10))
    names = batch_names(len(units), per_job)
    assert [unit for name in names for unit in batch_of(name, units, per_job)] == units
    for wrong in (f"{len(names):05d}", "-1", "x", ""):
        with pytest.raises(UserError, match="give a number"):
            batch_of(wrong, units, per_job)


def test_the_rules_take_the_names_of_however_many_batches() -> None:
    rules = Path(__file__).parents[2] / "workflow" / "rules"
    for name, program in (("corpus", "corpus_scans"), ("tokens", "tokenize_shards")):
        text = (rules / f"{name}.smk").read_text()
        (allowed,) = re.findall(
            rf'^rule {program}:.*?wildcard_constraints:\s+batch="(.*?)"', text, re.DOTALL | re.MULTILINE
        )
        pattern = re.compile(regex_from_filepattern(f"{{batch,{allowed}}}.done"))  # as Snakemake reads it
        assert all(pattern.match(f"{batch}.done") for batch in batch_names(100_001, 1)[:: 100_000 // 2])
        assert not any(pattern.match(name) for name in ("0000.done", "x00000.done", "00000/x.done"))


def test_a_batch_of_another_size_has_another_done_file(tmp_path: Path) -> None:
    def folders(*changed: str) -> set[str]:
        words = ("experiment=tiny", f"paths.results={tmp_path}", *changed)
        graph, config = Graph({"set": " ".join(words)}, False), load(words)
        names = {program.folder(config) for program in (corpus_scans.BATCHES, tokenize_shards.BATCHES, BATCHES)}
        for program in ("corpus_scans", "tokenize_shards", "tokenize_plan"):
            path = Path(graph.batch("tokenize", program, ".done"))
            assert path.parent.name in names  # the rule declares what the job writes
            assert f"{path.parent.name}/" in graph.batch_command("tokenize", program)
        return names

    changed = folders("launch.pieces_per_job=7", "launch.shards_per_job=7")
    assert changed & folders() == {"tokenize_plan.1.batches"}


@pytest.fixture(name="words")
def _words(tmp_path: Path) -> list[str]:
    """Batch 0 of a corpus of one small file."""
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    paths = [f"corpus.paths=[{tmp_path}/text.txt]", f"paths.results={tmp_path}"]
    return ["00000", "experiment=tiny", "corpus=files", *paths]


def test_secrets_of_a_failure_never_reach_log_ledger_or_terminal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = "hf_" + "Canary7" * 5
    monkeypatch.setenv("HF_TOKEN", canary)

    def leak(*_: object) -> None:
        raise RuntimeError(f"read with {canary} failed")

    monkeypatch.setattr(batches.manifests, "verify", leak)
    assert BATCHES.main(words) == 1
    told = capsys.readouterr().err
    (log,) = tmp_path.rglob("00000.log")
    assert "RuntimeError: read with" in told and str(log) in told and "Traceback" in log.read_text()
    monkeypatch.setattr(batches, "known_lock", leak)  # before there is a log, the terminal gets the traceback
    assert BATCHES.main(words) == 1
    assert canary not in told + (later := capsys.readouterr().err) and "Traceback" in later
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or canary.encode() not in path.read_bytes(), path


def test_the_same_75_three_times_stops_with_the_reason(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise StopRequested("SIGTERM")

    monkeypatch.setattr(batches.manifests, "verify", stop)
    assert [BATCHES.main(words) for _ in range(4)] == [75, 75, 75, 1]
    assert "without progress" in capsys.readouterr().err.splitlines()[-1]
