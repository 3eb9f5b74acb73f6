"""Which checkpoints a run takes up: its own, whole ones; and what it says of others."""

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.artifacts import retry
from headrace.checkpoint.reader import steps
from headrace.errors import UserError
from toy_run import Recorder, ToyModel, assert_same_end, frozen, toy_config, toy_trainer


@pytest.fixture
def slice_() -> dict[str, Any]:
    return {
        "stage": "pretrain",
        "version": 2,
        "config": {"recipe": {"learning_rate": {"peak": 0.001}, "tokens": 100}, "seed": {"data": 0}},
        "parents": {"tokenize": "abc"},
    }


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    toy_trainer(toy_config(), tmp_path).run()
    with pytest.raises(UserError, match=r"belongs to another run.*\n  fingerprint: '0123456789ab' there, 'f{12}' here"):
        toy_trainer(toy_config(), tmp_path, fingerprint="f" * 12).run()


def test_what_differs_is_shown_and_can_be_accepted(
    tmp_path: Path, slice_: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    toy_trainer(toy_config(), tmp_path, Recorder(6), slice=slice_, data="xxh3:1", code="v1").run()
    other = {**slice_, "version": 3, "config": {**slice_["config"], "recipe": {"learning_rate": {"peak": 0.002}}}}
    config = toy_config()
    with pytest.raises(UserError) as raised:
        toy_trainer(config, tmp_path, slice=other, data="xxh3:2", code="v1").run()
    text = str(raised.value)
    for line in (
        "  version: 2 there, 3 here",
        "  recipe.learning_rate.peak: 0.001 there, 0.002 here",
        "  recipe.tokens: 100 there, None here",
        "  data: 'xxh3:1' there, 'xxh3:2' here",
    ):
        assert line in text.splitlines()
    assert "seed" not in text
    assert "checkpoint.accept_other=true" in text
    accepting = replace(config, checkpoint=replace(config.checkpoint, accept_other=True))
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        assert toy_trainer(accepting, tmp_path, recorder, slice=other, data="xxh3:2", code="v1").run().finished
    assert recorder.shown[0] == 7
    assert "taken up all the same" in caplog.text
    assert frozen(tmp_path)[1]["slice"] == other  # from here on it is this run's


def test_other_code_is_a_warning(tmp_path: Path, slice_: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(toy_config(), tmp_path, Recorder(6), slice=slice_, code="v1+4").run()
    with caplog.at_level(logging.WARNING):
        assert toy_trainer(toy_config(), tmp_path, slice=slice_, code="v1+5").run().finished
    assert "step-00000006: written by other code, v1+4; this is v1+5" in caplog.text


def test_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    toy_trainer(toy_config(), tmp_path, Recorder(2)).run()
    config = toy_config()
    adamw = replace(config.recipe, optimizer=replace(config.recipe.optimizer, name="adamw"))
    with pytest.raises(UserError, match=r"step-00000002: .*\(kind optimizer\)"):
        toy_trainer(replace(config, recipe=adamw), tmp_path).run()


def test_an_average_of_the_weights_that_is_not_there_is_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(toy_config(), tmp_path, Recorder(6)).run()
    config = toy_config()
    with caplog.at_level(logging.WARNING):
        toy_trainer(replace(config, recipe=replace(config.recipe, ema_decay=0.5)), tmp_path).run()
    assert "has no average of the weights" in caplog.text
    assert frozen(tmp_path)[1]["ema"] == {"updates": 6}


@pytest.mark.parametrize("name", ["optimizer-00000.safetensors", "state.json", "slices.json", "manifest.json"])
def test_any_damaged_file_leads_to_the_checkpoint_before(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_trainer(toy_config(), tmp_path / "straight").run()
    toy_trainer(toy_config(), tmp_path / "ours", Recorder(9)).run()
    damage(tmp_path / "ours" / "step-00000009" / name)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        toy_trainer(toy_config(), tmp_path / "ours", recorder).run()
    assert "checkpoint of step 9 is not used, falling back to an older one: rank 0: " in caplog.text
    assert name in caplog.text
    assert recorder.of("resumed")[0]["step"] == 8
    assert_same_end(tmp_path / "ours", tmp_path / "straight")


def test_where_none_is_whole_the_run_begins_again_with_fresh_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tensors of a damaged checkpoint have been read in part by then."""
    config = toy_config()
    config = replace(config, recipe=replace(config.recipe, ema_decay=0.5))
    toy_trainer(config, tmp_path / "straight").run()
    toy_trainer(config, tmp_path / "ours", Recorder(9)).run()
    for step in steps(tmp_path / "ours"):
        damage(tmp_path / "ours" / f"step-{step:08d}" / "optimizer-00000.safetensors")
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        toy_trainer(config, tmp_path / "ours", recorder).run()
    assert "none of 2 checkpoints is whole; training starts again from its beginning" in caplog.text
    assert recorder.shown[0] == 1
    assert_same_end(tmp_path / "ours", tmp_path / "straight")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_where_the_file_system_withholds_them_nothing_is_begun_again_nor_removed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is damaged, the other whole; once it can be read again, training goes on from it."""
    toy_trainer(toy_config(), tmp_path / "straight").run()
    toy_trainer(toy_config(), tmp_path / "ours", Recorder(9)).run()
    damage(tmp_path / "ours" / "step-00000009" / "optimizer-00000.safetensors")
    opened, recorder = os.open, Recorder()

    def withheld(path: Path, flags: int, *mode: int, **given: int) -> int:
        if str(path).endswith("step-00000008/optimizer-00000.safetensors"):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *mode, **given)

    monkeypatch.setattr(retry, "PAUSES", (0.0,))
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"none of 2 .* may be whole: .*00000008/optim"):
        patch.setattr(os, "open", withheld)
        toy_trainer(toy_config(), tmp_path / "ours", recorder).run()
    assert recorder.shown == []
    assert steps(tmp_path / "ours") == [8, 9]
    toy_trainer(toy_config(), tmp_path / "ours", recorder).run()
    assert recorder.of("resumed")[0]["step"] == 8
    assert_same_end(tmp_path / "ours", tmp_path / "straight")


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def drawn(stop_after: int | None) -> torch.Tensor:
        toy_trainer(toy_config(), tmp_path, Recorder(stop_after), ToyModel()).run()
        return torch.rand(3)

    torch.manual_seed(5)
    first = drawn(3)
    torch.manual_seed(6)
    assert torch.equal(drawn(0), first)
