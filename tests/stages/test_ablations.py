"""`ablations` runs all experiments to their evaluation, goes on after "run me again", and compares with the first."""

import importlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import read_json
from headrace.config.compose import load, to_dict
from headrace.stages import ablations
from headrace.stages.ablations import EXPERIMENTS, stages_before_comparing
from headrace.stages.run import main
from small_corpus import write_texts


@pytest.fixture(name="calls")
def _calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The stages that were started; `compared` is put behind them."""
    made: list[tuple[str, ...]] = []

    def run(command: Sequence[str]) -> Any:
        made.append((command[2].removeprefix("headrace.stages."), *command[3:]))
        return SimpleNamespace(returncode=75 if made[-1][0] == "pretrain" and made.count(made[-1]) == 1 else 0)

    def write(config: Any, names: Sequence[str]) -> Path:
        made.append(("compared", *names))
        (tmp_path / ablations.TABLE).write_text("a table")
        return tmp_path

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(ablations, "write", write)
    monkeypatch.setattr(ablations, "_fingerprint", lambda words: words[0].removeprefix("experiment="))
    return made


def test_all_are_evaluated_on_equal_terms_and_compared_with_the_first(calls: list[tuple[str, ...]]) -> None:
    assert ablations.main(["recipe.tokens=1e6"]) == 0
    order = [*stages_before_comparing()]
    order.insert(order.index("pretrain"), "pretrain")  # it ended with 75 once
    expected = [(stage, f"experiment={name}", "recipe.tokens=1e6") for name in EXPERIMENTS for stage in order]
    assert calls == [*expected, ("compared", *EXPERIMENTS)]


def test_a_stage_that_fails_ends_it(calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=2))
    assert ablations.main([]) == 2
    assert calls == []


def test_a_fault_of_ours_is_told_with_its_traceback(
    calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "_fingerprint", lambda words: {}[words[0]])
    assert ablations.main([]) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and told.endswith("headrace ablations: KeyError: 'experiment=ablations'\n")


@pytest.mark.parametrize("named", ["experiment=tiny", "experiment=ablations_dense"])
def test_another_experiment_is_refused(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablations.main([named]) == 2
    told = capsys.readouterr().err
    assert f"{named}: `snakemake ablations` trains experiments of its own" in told and told.count("\n") == 1


def test_the_experiment_that_all_are_compared_with_may_be_named(calls: list[tuple[str, ...]]) -> None:
    """As `snakemake ablations --config experiment=ablations` does."""
    assert ablations.main(["experiment=ablations"]) == 0
    assert calls[0] == ("corpus", "experiment=ablations") and calls[-1] == ("compared", *EXPERIMENTS)
    assert {words[1:] for words in calls[:-1]} == {(f"experiment={name}",) for name in EXPERIMENTS}


SMALL = (
    "model=pico", "model.num_hidden_layers=3", "recipe=tiny", "evaluate=tiny", "parallel=single", "tracking=disabled",
    "corpus=files", "corpus.validation_fraction=0.2", "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300",
    "tokens.shards=1", "recipe.sequence_length=16", "recipe.batch_sequences=8", f"recipe.tokens={128 * 4}",
    "recipe.batch_ramp=null", "recipe.extensions=[]", "evaluate.tasks=[reasoning_gym]", "evaluate.items=12",
    "evaluate.heldout_rows=24", "evaluate.samples=0", "train.validation_rows=3", "launch.threads=1",
    "launch.device=cpu",
)  # fmt: skip


def test_all_five_are_trained_evaluated_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages' own programs, in this process: started thirty times, they would mostly import torch."""

    def run(command: Sequence[str]) -> Any:
        return SimpleNamespace(returncode=main(importlib.import_module(command[2]).DOOR, command[3:]))

    monkeypatch.setattr(ablations, "subprocess", SimpleNamespace(run=run))
    write_texts(tmp_path)
    results = tmp_path / "results"
    assert ablations.main([*SMALL, f"corpus.paths=[{tmp_path}/texts]", f"paths.results={results}"]) == 0
    (path,) = results.glob("compare/*/compare.json")
    facts = read_json(path)
    assert [set(each["differs"]) for each in facts["runs"]] == [
        set(),
        {"model.num_nextn_predict_layers=0"},
        {"recipe.balance.bias_update_speed=0", "recipe.balance.loss_weight=0.001"},
        {"model.first_k_dense_replace=3", "model.intermediate_size=448"},
        {"recipe.optimizer.name=adamw"},
    ]
    rows = {(row["task"], row["metric"]): row for row in facts["rows"]}
    bits = rows["bits_per_byte", "bits per byte"]
    for name in (each["name"] for each in facts["runs"]):
        summary = manifests.read(results / "evaluate" / name / "artifact").summary
        assert bits["values"][name]["value"] == pytest.approx(summary["bits_per_byte"])
    assert len(bits["differences"]) == 4 and all(each["value"] for each in bits["differences"].values())
    assert rows["reasoning_gym", "accuracy"]["items"] == 12 and facts["left_out"] == []
    assert path.with_name("compare.md").read_text() in capsys.readouterr().out


def test_each_differs_from_the_baseline_by_what_its_name_says_alone() -> None:
    baseline, *others = (to_dict(load([f"experiment={name}"])) for name in EXPERIMENTS)
    changed = [{group for group in baseline if other[group] != baseline[group]} for other in others]
    assert changed == [{"model"}, {"recipe"}, {"model"}, {"recipe"}]
