"""`compare` finds finished evaluations by the beginnings of their names, verifies them, and writes the comparison."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json, write_json
from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.stages import compare, convert, evaluate, pretrain
from headrace.stages.places import places
from headrace.stages.run import main
from small_corpus import tokenized
from wandb_file import read_wandb

A, B, C = "3fa1aaaaaaaa", "3fb2bbbbbbbb", "77c0cccccccc"
SCORES = {
    name: (np.random.default_rng(seed).random(80) < share).astype(float)
    for name, seed, share in ((A, 0, 0.3), (B, 1, 0.7), (C, 2, 0.3))
}


def finish(results: Path, name: str, scores: np.ndarray, learning_rate: float, salt: str = "") -> Path:
    """A finished evaluate and the pretrain behind it, as the stages leave them."""
    trained, folder = results / "pretrain" / name[::-1], results / "evaluate" / name
    for run, parents, config in (
        (trained, {}, {"recipe": {"tokens": 2000, "learning_rate": {"peak": learning_rate}}}),
        (folder, {"pretrain": name[::-1]}, {"evaluate": {"items": 80}}),
    ):
        run.mkdir(parents=True)
        write_json(run / "stage.json", {"stage": run.parent.name, "version": 1, "config": config, "parents": parents})
    output = folder / "artifact.partial"
    output.mkdir()
    write_json(output / "results.json", {"tasks": {"quiz": {"definition": "d"}}})
    entries = [
        {"task": "quiz", "item": f"q{i:02}", "hash": f"h{i}{salt}", "unit": f"q{i:02}", "scores": {"acc": score}}
        for i, score in enumerate(scores.tolist())
    ]
    (output / "items.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    manifests.build(output, kind="evaluate", producer={}, inputs={}, summary={})
    manifests.commit(output, folder / "artifact")
    return folder


def finished_report(results: Path, evaluate: str) -> Path:
    folder = results / "report" / evaluate[::-1]
    (folder / "artifact").mkdir(parents=True)
    write_json(folder / "stage.json", {"parents": {"evaluate": evaluate}})
    page = "<p>before</p><!--comparisons-->This run was not compared<!--/comparisons--><p>after</p>"
    (folder / "artifact" / "report.html").write_text(page)
    manifests.build(folder / "artifact", kind="report", producer={}, inputs={}, summary={})
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, rate in ((A, 1e-3), (B, 2e-3), (C, 1e-3)):
        finish(tmp_path / "results", name, SCORES[name], rate)
    return tmp_path / "results"


def call(results: Path, runs: str, *words: str) -> int:
    return compare.main([f"runs={runs}", f"paths.results={results}", "tracking=disabled", *words])


def test_runs_are_found_by_their_beginnings_and_compared_with_the_first(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {name: finished_report(results, name) for name in (A, C)}
    assert call(results, "[3fa,3fb2,7]") == 0
    (folder,) = (results / "compare").iterdir()
    facts: dict[str, Any] = read_json(folder / "compare.json")
    assert facts["first"] == A and [run["name"] for run in facts["runs"]] == [A, B, C]
    assert [run["differs"] for run in facts["runs"]] == [[], ["recipe.learning_rate.peak=0.002"], []]
    own = facts["rows"][0]["differences"][B]
    expected = stats.ttest_rel(SCORES[B], SCORES[A])
    assert own["value"] == pytest.approx((SCORES[B] - SCORES[A]).mean()) and own["p"] == pytest.approx(expected.pvalue)
    assert own["found"] == "better" and facts["rows"][0]["differences"][C]["found"] is None
    shown = capsys.readouterr()
    assert (folder / "compare.md").read_text() in shown.out and f"## {B} - {A}" in shown.out
    assert str(folder / "compare.md") in shown.err
    pages = {name: (folder / "report.html").read_text() for name, folder in reports.items()}
    assert "77c0" in pages[C] and all(name in pages[A] for name in (A, B, C)) and "was not compared" not in pages[A]
    page = (folder / "compare.html").read_text()
    assert all(name in page for name in (A, B, C)) and "recipe.learning_rate.peak=0.002" in page
    before = (folder / "compare.json").read_bytes()
    assert call(results, "[3fa,3fb2,7]") == 0 and (folder / "compare.json").read_bytes() == before
    tracked = read_json(folder / "tracking" / "run.json")
    assert tracked["summary"][f"quiz/acc/{B} - {A}"]["value"] == own["value"]
    assert [entry["name"] for entry in tracked["inputs"]] == [f"evaluate-{name}" for name in (A, B, C)]
    assert (
        call(results, "[7,3fa]") == 0 and len(list((results / "compare").iterdir())) == 2
    )  # another order, another first


def test_the_record_in_wandb_holds_the_paired_figures(results: Path) -> None:
    """The file that `snakemake sync` would upload, read as W&B writes it."""
    assert compare.main(["runs=[3fa,3fb2,7]", f"paths.results={results}", "tracking=offline"]) == 0
    (folder,) = (results / "compare").iterdir()
    (file,) = (folder / "tracking").rglob("*.wandb")
    run = read_wandb(file)
    assert (run.run_id, run.job_type, run.exit_code) == (f"compare-{folder.name}", "compare", 0)
    assert run.config["runs"] == [A, B, C]
    assert [entry["name"] for entry in run.config["inputs"]] == [f"evaluate-{name}" for name in (A, B, C)]
    (row,) = read_json(folder / "compare.json")["rows"]
    for name in (B, C):
        own = run.summary[f"quiz/acc/{name} - {A}"]
        assert own == row["differences"][name]
        expected = stats.ttest_rel(SCORES[name], SCORES[A])
        assert own["value"] == pytest.approx((SCORES[name] - SCORES[A]).mean())
        assert own["p"] == pytest.approx(expected.pvalue)
        low, high = expected.confidence_interval(0.95)
        assert (own["low"], own["high"]) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("[3f,77]", f"runs: 3f begins {A} and {B}; write more of it"),
        ("[3fa,00]", "runs: 00: no evaluate under"),
        ("[3fa,3fa1]", "name the same run twice"),
        ("[3fa]", "runs: name two or more fingerprints"),
        ("[3fa,../x]", "runs: name two or more fingerprints"),
        ("[3fa,*]", "runs: name two or more fingerprints"),
        ("[3fa,eeee]", "runs: eeee: eeeeeeeeeeee is not finished"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    results: Path, runs: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "evaluate" / "eeeeeeeeeeee").mkdir()
    assert call(results, runs) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (results / "compare").exists()


def test_a_tracker_that_is_not_installed_is_asked_for(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not, wherever it is
    assert call(results, "[3fa,3fb]", "tracking.backend=trackio", "tracking.wandb=offline") == 2
    assert "tracking.backend=trackio: not installed" in capsys.readouterr().err


def test_no_runs_named_is_the_users_mistake(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([f"paths.results={results}"]) == 2
    assert "runs: name two or more" in capsys.readouterr().err


def test_runs_with_other_items_are_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(results, "0d0d0d0d0d0d", SCORES[A], 1e-3, salt="another")
    assert call(results, "[3fa,0d]") == 2
    told = capsys.readouterr().err
    assert f"evaluate {A}, 0d0d0d0d0d0d: nothing to compare: quiz: other items in 0d0d0d0d0d0d (80)" in told
    assert told.count("\n") == 1 and not (results / "compare").exists()


def test_a_fault_of_ours_is_told_with_its_traceback(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "find", lambda results, prefix: {}[prefix])
    assert call(results, "[3fa,3fb]") == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and told.endswith("headrace compare: KeyError: '3fa'\n")


def test_a_damaged_result_is_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results / "evaluate" / B / "artifact" / "items.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"acc": 0.0', b'"acc": 1.0', 1))
    assert call(results, "[3fa,3fb]") == 2
    assert "items.jsonl: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["runs=[3fa1,77]", "runs=3fa1,77", "runs=[3fa1, 77]"])
def test_runs_are_named_as_snakemake_and_as_shells_leave_them(spelling: str) -> None:
    assert compare.prefixes([spelling]) == ["3fa1", "77"]
    with pytest.raises(UserError):
        compare.prefixes([spelling, spelling])


def test_the_program_runs_as_its_usage_says(results: Path) -> None:
    words = ["runs=[3fa,77]", f"paths.results={results}", "tracking=disabled"]
    made = subprocess.run([sys.executable, "-m", "headrace.stages.compare", *words], capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout.startswith("# Runs compared"), made.stderr


SMALL = (
    "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "recipe.sequence_length=16", "recipe.batch_sequences=8",
    f"recipe.tokens={128 * 20}", "recipe.extensions=[]", "evaluate.tasks=[reasoning_gym]", "evaluate.items=12",
    "evaluate.samples=0", "train.validate_every=20", "train.validation_rows=3", "launch.threads=1",
    "launch.device=cpu", "recipe.batch_ramp=null",
)  # fmt: skip


def test_a_model_and_its_dense_twin_are_trained_evaluated_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real stages, from text to the table, as an ablation is made."""
    words, names = tokenized(tmp_path, SMALL), []
    for changed in ([], ["model.first_k_dense_replace=2", "model.intermediate_size=128"]):
        own = [*words, *changed]
        assert [main(stage.DOOR, own) for stage in (pretrain, convert, evaluate)] == [0, 0, 0]
        config = load(own)
        names.append(places(config, known_lock(config).hash)["evaluate"].fingerprint)
    results = config.paths.results
    assert compare.main([f"runs=[{names[0][:6]},{names[1]}]", f"paths.results={results}", "tracking=disabled"]) == 0
    (path,) = Path(results).glob("compare/*/compare.json")
    facts = read_json(path)
    assert facts["runs"][1] == {"name": names[1], "differs": ["model.first_k_dense_replace=2"]}
    rows = {(row["task"], row["metric"]): row for row in facts["rows"]}
    bits = rows["bits_per_byte", "bits per byte"]
    for name in names:
        summary = manifests.read(Path(results) / "evaluate" / name / "artifact").summary
        assert bits["values"][name]["value"] == pytest.approx(summary["bits_per_byte"])
    assert rows["reasoning_gym", "accuracy"]["items"] == 12 and facts["left_out"] == []
    assert names[1] in capsys.readouterr().out


def test_help_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--help"]) == 0 and "runs=[" in capsys.readouterr().out
