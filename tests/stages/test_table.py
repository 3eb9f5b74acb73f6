"""Fingerprints: a value changes its stage and all after it, and nothing else."""

import dataclasses
from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.stages import table
from headrace.stages.table import (
    MACHINE_GROUPS,
    NAMES,
    STAGES,
    fingerprints,
    parents_of,
    readable_groups,
    slices,
    stage_named,
)

SOURCES = "0" * 64


def changed(*words: str) -> set[str]:
    before, after = fingerprints(load(), SOURCES), fingerprints(load(words), SOURCES)
    return {name for name in NAMES if before[name] != after[name]}


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("corpus.max_bytes=1000000", "corpus"),
        ("tokenizer.sample_bytes=5", "tokenizer"),
        ("tokens.shards=3", "tokenize"),
        ("tokens.fim_rate=0.2", "tokenize"),
        ("recipe.learning_rate.peak=2e-3", ("pretrain", "precision_study")),
        ("model.n_routed_experts=8", ("pretrain", "precision_study")),
        ("precision=fp32", "pretrain"),
        ("seed.init=1", ("pretrain", "precision_study")),
        ("train.from=0123456789ab@5", ("pretrain", "precision_study")),
        ("train.mask_documents=true", ("pretrain", "precision_study")),
        ("study.tokens=5", "precision_study"),
        ("precision@study.candidate=fp32", "precision_study"),
        ("convert.dtype=fp32", "convert"),
        ("evaluate.tasks=[reasoning_gym]", "evaluate"),
        ("publish.repo_id=me/model", "publish"),
    ],
)
def test_a_changed_value_changes_its_stage_and_what_follows(word: str, first: str | tuple[str, ...]) -> None:
    following = {first} if isinstance(first, str) else set(first)
    for row in STAGES:
        if following & set(row.parents):
            following.add(row.name)
    assert changed(word) == following


@pytest.mark.parametrize(
    "word",
    ["tracking=disabled", "tracking.log_level=debug", "launch.threads=1", "launch.device=cpu", "parallel.microbatch=2",
     "checkpoint.interval=7", "paths.results=/elsewhere"],
)  # fmt: skip
def test_the_machine_changes_nothing(word: str) -> None:
    assert changed(word) == set()


def test_runs_without_masks_keep_the_fingerprints_of_before_there_were_any() -> None:
    for words, there in (([], False), (["train.mask_documents=true"], True)):
        for name in ("pretrain", "precision_study"):
            assert ("mask_documents" in slices(load(words), SOURCES)[name]["config"]["train"]) == there


def test_a_tokenizer_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    words = ["tokenizer=file", f"tokenizer.path={path}", "tokenizer.vocab_size=300"]
    path.write_text("one")
    before = fingerprints(load(words), SOURCES)
    path.write_text("two")
    after = fingerprints(load(words), SOURCES)
    assert before["corpus"] == after["corpus"]
    assert before["tokenizer"] != after["tokenizer"]
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        fingerprints(load(words), SOURCES)


def test_every_group_is_either_hashed_or_the_machines() -> None:
    groups = {field.name for field in dataclasses.fields(load())}
    hashed = {key for row in STAGES for key in row.keys}
    assert hashed | set(MACHINE_GROUPS) == groups
    assert not hashed & set(MACHINE_GROUPS)


def test_changed_sources_change_everything() -> None:
    assert all(fingerprints(load(), "1" * 64)[name] != fingerprints(load(), SOURCES)[name] for name in NAMES)


def test_a_raised_version_changes_the_stage_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprints(load(), SOURCES)
    raised = tuple(dataclasses.replace(row, version=99) if row.name == "convert" else row for row in STAGES)
    monkeypatch.setattr(table, "STAGES", raised)
    now = fingerprints(load(), SOURCES)
    assert {name for name in NAMES if now[name] != before[name]} == {"convert", "evaluate", "publish", "report"}


def test_parents_stand_above_and_see_no_more_than_they_hash() -> None:
    for config in (load(), load(["study.in_report=true"])):
        for index, row in enumerate(STAGES):
            assert set(parents_of(row, config)) <= set(NAMES[:index])
    assert "evaluate" not in readable_groups(stage_named("pretrain"), load())
    assert "precision" not in readable_groups(stage_named("precision_study"), load())
    assert {"corpus", "tokens", "recipe", "launch"} <= readable_groups(stage_named("evaluate"), load())


def test_the_report_reads_the_study_only_where_it_is_asked_to() -> None:
    assert changed("study.in_report=true") == {"report"}, "who reads the study does not change the study"
    report, asked = stage_named("report"), load(["study.in_report=true"])
    assert "precision_study" not in parents_of(report, load())
    assert "precision_study" in parents_of(report, asked)
    assert ("study" in readable_groups(report, load()), "study" in readable_groups(report, asked)) == (False, True)
    before = fingerprints(asked, SOURCES)
    after = fingerprints(load(["study.in_report=true", "study.tokens=5"]), SOURCES)
    assert {name for name in NAMES if before[name] != after[name]} == {"precision_study", "report"}


def test_a_tokenizer_on_the_hub_is_known_by_its_commit() -> None:
    words = ["tokenizer=file", "tokenizer.vocab_size=300"]
    one, two = (
        fingerprints(load([*words, f"tokenizer.path=hf://a/b@{digit * 40}"]), SOURCES)["tokenizer"] for digit in "01"
    )
    assert one != two
    for loose in ("hf://a/b", "hf://a/b@main"):
        with pytest.raises(UserError, match="40 hexadecimal digits"):
            fingerprints(load([*words, f"tokenizer.path={loose}"]), SOURCES)
