"""The loop on a stand-in model: exact resume, accumulation, and what is written down."""

import errno
import json
import logging
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.artifacts.tensors import load_tensors
from headrace.checkpoint.reader import checkpoint_folder, open_checkpoint, steps, tensors_of
from headrace.config.schema import Config
from headrace.parallel.shards import Piece
from headrace.pipeline.engine import Losses, Unwatched
from headrace.training import trainer as trainer_module
from headrace.training.integrity import MEMORY, RECOMPUTATION, REPLICAS, Corruption, CorruptionError, Integrity
from toy_run import (
    EXPERTS,
    LENGTH,
    Recorder,
    ToyLearner,
    ToyModel,
    assert_same_end,
    frozen,
    toy_batch,
    toy_config,
    toy_rows,
    toy_trainer,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = toy_trainer(toy_config(), folder).run()
    assert (outcome.finished, outcome.step, outcome.reason) == (True, 12, None)
    return folder


def test_loss_falls_far_below_that_of_guessing(tmp_path: Path) -> None:
    recorder = Recorder()
    toy_trainer(toy_config(200), tmp_path, recorder).run()
    losses = [metrics["loss"] for _, metrics in recorder.logged]
    assert 2.0 < losses[0] < 4.0  # ln 15 = 2.7 is guessing
    assert losses[-1] < 0.5
    assert recorder.logged[0][1]["maxvio_layer_0"] == recorder.logged[0][1]["maxvio"] > 0
    assert recorder.closed


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_stopped_by_the_deadline_and_resumed_is_bitwise_equal(
    tmp_path: Path, undisturbed: Path, stop_after: int
) -> None:
    outcome = toy_trainer(toy_config(), tmp_path, Recorder(stop_after)).run()
    assert (outcome.finished, outcome.step, outcome.reason) == (False, stop_after, "told to")
    assert steps(tmp_path)[-1] == stop_after
    torch.manual_seed(999)  # the random state comes from the checkpoint, not from this process
    assert toy_trainer(toy_config(), tmp_path).run().finished
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("how", ["asynchronous", "synchronous"])
def test_killed_with_sigkill_and_resumed_is_bitwise_equal(tmp_path: Path, undisturbed: Path, how: str) -> None:
    script = str(Path(__file__).parents[1] / "toy_run.py")
    for step in (6, 11):
        run = subprocess.run([sys.executable, script, str(tmp_path), str(step), how], timeout=120)
        assert run.returncode == -signal.SIGKILL
    kept = steps(tmp_path)
    # The toy's steps are shorter than a save, so what was under way when the process was killed is lost with it.
    assert kept == [4, 8] if how == "synchronous" else set(kept) <= {4, 8}
    assert toy_trainer(toy_config(), tmp_path).run().finished
    assert_same_end(tmp_path, undisturbed)


def test_a_damaged_newest_checkpoint_costs_steps_but_not_the_result(
    tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_trainer(toy_config(), tmp_path, Recorder(9)).run()
    path = tmp_path / "step-00000009" / "model-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        toy_trainer(toy_config(), tmp_path, recorder).run()
    assert "step-00000009/model-00000.safetensors" in caplog.text
    assert recorder.shown[0] == 9  # from step 8 on
    assert_same_end(tmp_path, undisturbed)


def test_history_has_every_step_once_however_often_it_was_killed(tmp_path: Path) -> None:
    for stop in (3, 2, 5):
        toy_trainer(toy_config(), tmp_path, Recorder(stop)).run()
    toy_trainer(toy_config(), tmp_path).run()
    rows = frozen(tmp_path)[1]["history"]["rows"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "validation_loss" in row] == [5, 10, 12]
    assert [row["tokens"] for row in rows] == [step * 4 * LENGTH for step in range(1, 13)]


def test_a_finished_run_only_reads_its_checkpoint(tmp_path: Path) -> None:
    toy_trainer(toy_config(), tmp_path).run()
    recorder, (before, _) = Recorder(), frozen(tmp_path)
    model = ToyModel()
    assert toy_trainer(toy_config(), tmp_path, recorder, model).run().finished
    assert recorder.shown == []
    assert all(torch.equal(before[f"model {name}"], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("microbatch", [1, 2])
def test_accumulation_equals_one_big_batch(tmp_path: Path, microbatch: int) -> None:
    models = {}
    for size in (4, microbatch):
        config = toy_config(6)
        config = replace(config, parallel=replace(config.parallel, microbatch=size))
        models[size] = ToyModel()
        toy_trainer(config, tmp_path / str(size), model=models[size]).run()
    for name, tensor in models[4].state_dict().items():
        torch.testing.assert_close(models[microbatch].state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    # The bias moves once a step, from the counts of all 4 sequences, whatever the microbatch.
    assert models[4].bias_updates == models[microbatch].bias_updates
    assert len(models[4].bias_updates) == 6
    assert all(sum(counts[0]) == 4 * LENGTH for counts, _ in models[4].bias_updates)


def test_bias_speed_follows_the_plan(tmp_path: Path) -> None:
    config = toy_config(10)
    balance = replace(config.recipe.balance, bias_update_speed=0.5, bias_update_until="70%")
    model = ToyModel()
    toy_trainer(replace(config, recipe=replace(config.recipe, balance=balance)), tmp_path, model=model).run()
    assert [speed for _, speed in model.bias_updates] == [0.5] * 7 + [0.0] * 3


def test_starting_from_another_run_takes_weights_moments_and_position(tmp_path: Path, undisturbed: Path) -> None:
    source = undisturbed / "step-00000012"
    recorder, model, seen = Recorder(1), ToyModel(), []
    rows = toy_rows(lambda first, sequences: (seen.append(first), toy_batch(first, sequences))[1])
    trainer = toy_trainer(toy_config(6), tmp_path, recorder, model, rows, source, "aaaaaaaaaaaa")
    trainer.run()
    assert seen == [48]  # 12 steps of 4 rows were read before
    tensors, state = frozen(tmp_path)
    assert (state["step"], state["tokens"], state["optimizer"]) == (1, 4 * LENGTH, {"updates": 13})
    assert state["plan"]["tokens_before"] == 0
    old = open_checkpoint(source).get("model", "experts.weight")
    assert 0 < (tensors["model experts.weight"] - old).abs().max() < 0.1  # one small step away
    recorder.stop_after = None
    assert toy_trainer(toy_config(6), tmp_path, Recorder(), ToyModel(), rows, source, "aaaaaaaaaaaa").run().finished
    assert seen == [48, 52, 56, 60, 64, 68]  # once begun, its own checkpoints count


def test_retention_follows_the_configuration(tmp_path: Path) -> None:
    config = toy_config()
    settings = replace(config.checkpoint, interval=1, keep=2, keep_every=5)
    toy_trainer(replace(config, checkpoint=settings), tmp_path).run()
    assert steps(tmp_path) == [5, 10, 11, 12]


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Config, ToyModel, Path]:
    config, model, folder = toy_config(), ToyModel(), tmp_path / "artifact"
    folder.mkdir()
    trainer = toy_trainer(config, tmp_path / "checkpoints", model=model)
    trainer.run()
    trainer.write_results(folder)
    return config, model, folder


def test_results_are_written_again_where_an_attempt_was_ended_behind_them(
    finished: tuple[Config, ToyModel, Path], tmp_path: Path
) -> None:
    config, model, folder = finished
    before = sorted(folder.rglob("*"))
    (folder / "checkpoint" / "model-00001.safetensors").touch()  # of another layout
    again = toy_trainer(config, tmp_path / "checkpoints", model=model)
    again.run()
    again.write_results(folder)
    assert sorted(folder.rglob("*")) == before


def test_artifact_holds_what_the_next_stages_read(finished: tuple[Config, ToyModel, Path], tmp_path: Path) -> None:
    _, _, folder = finished
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint", "training.json", "metrics.jsonl", "expert_load.json", "agreement.safetensors",
    }  # fmt: skip
    names = {path.name for path in (folder / "checkpoint").iterdir()}
    assert names == {"slices.json", "model-00000.safetensors"}  # no moments, which are no use to anybody downstream
    for name in names:
        link = checkpoint_folder(tmp_path / "checkpoints", 12) / name
        assert (folder / "checkpoint" / name).stat().st_ino == link.stat().st_ino
    agreement = load_tensors(folder / "agreement.safetensors")
    assert agreement["tokens"].shape == (2, LENGTH + 1)
    assert agreement["tokens"].dtype == torch.int64
    reloaded = ToyModel()
    with tensors_of(folder / "checkpoint") as source:
        reloaded.load_state_dict({name: source.get(name) for name in source.keys()})  # noqa: SIM118 - no mapping
    expected = reloaded.token_log_probabilities(agreement["tokens"])
    torch.testing.assert_close(agreement["log_probabilities"], expected, rtol=0, atol=1e-6)
    assert agreement["log_probabilities"].dtype == torch.float32


def test_figures_of_the_artifact(finished: tuple[Config, ToyModel, Path]) -> None:
    config, model, folder = finished
    training = json.loads((folder / "training.json").read_text())
    assert (training["steps"], training["tokens"], training["position"]) == (12, config.recipe.tokens, 48)
    assert (training["device"], training["ranks"], training["dispatch"]) == ("cpu", 1, "local")
    assert training["gemm_peak_flops"] > 1e8
    assert training["mfu"] == pytest.approx(training["tokens_per_second"] * 1e4 / training["gemm_peak_flops"])
    assert training["tokens_per_second"] == pytest.approx(training["tokens"] / training["seconds"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert training["loss"] == pytest.approx(sum(row["loss"] for row in rows[-10:]) / 10)
    assert training["validation_loss"] == rows[-1]["validation_loss"]
    with torch.no_grad():
        direct = model.losses(toy_batch(5000, 3)).main.item()
    assert training["validation_loss"] == pytest.approx(direct, rel=1e-5)


def test_expert_load_matches_the_counts(finished: tuple[Config, ToyModel, Path]) -> None:
    _, model, folder = finished
    load = json.loads((folder / "expert_load.json").read_text())
    assert load["steps"] == list(range(1, 13))
    (name, shares), *others = load["layers"].items()
    assert (name, others) == ("0", [])
    for share, violation, (counts, _) in zip(shares, load["maxvio"]["0"], model.bias_updates, strict=True):
        assert share == pytest.approx([count / sum(counts[0]) for count in counts[0]], abs=1e-5)
        assert violation == pytest.approx(max(share) * EXPERTS - 1, abs=1e-4)
    assert load["maxvio_mean"] == load["maxvio"]["0"]


def test_a_timeline_is_of_one_step_and_not_of_the_validation_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 is drawn, and validated after."""
    called: list[str] = []
    for name in ("begin_timeline", "step", "timeline", "measure"):
        original = getattr(ToyLearner, name)

        def noted(self: ToyLearner, *given: object, name: str = name, original: Any = original) -> object:
            called.append(name)
            return original(self, *given)

        monkeypatch.setattr(ToyLearner, name, noted)
    toy_trainer(toy_config(), tmp_path / "checkpoints", timeline=tmp_path / "timeline.json").run()
    begin = called.index("begin_timeline")
    assert called[:begin] == ["step"] * 4
    assert called[begin : begin + 4] == ["begin_timeline", "step", "timeline", "measure"]
    assert json.loads((tmp_path / "timeline.json").read_text())["step"] == 5


def test_a_timeline_that_cannot_be_written_stops_nothing_and_a_later_step_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = trainer_module.write_json
    full = iter([OSError(errno.ENOSPC, "No space left on device")])

    def written(path: Path, content: object) -> None:
        for error in full:
            raise error
        write(path, content)

    monkeypatch.setattr(trainer_module, "write_json", written)
    toy_trainer(toy_config(), tmp_path / "checkpoints", timeline=tmp_path / "timeline.json").run()
    assert json.loads((tmp_path / "timeline.json").read_text())["step"] == 10


def test_rows_are_read_under_a_mark_of_their_own_so_that_a_read_that_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, seen = [""], []

    def doing(self: Unwatched, label: str) -> None:
        at[0] = label

    def batch(first: int, sequences: int) -> Tensor:
        seen.append(at[0])
        return toy_batch(first, sequences)

    monkeypatch.setattr(Unwatched, "doing", doing)
    toy_trainer(toy_config(3), tmp_path, rows=toy_rows(batch)).run()
    assert seen == [f"the rows of step {step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(("check", "kept"), [(MEMORY, [4, 8]), (REPLICAS, [4])])
def test_what_was_saved_since_the_state_was_known_to_be_good_is_removed_and_retention_has_left_what_was_before(
    check: str, kept: list[int], keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves after 4 and 8 steps; all was well before step 6, and something is found before step 10."""

    def look(self: Integrity, step: int) -> None:
        if step == 9:
            raise CorruptionError(Corruption(step + 1, check, (1,), "rank 1 differs"))
        if step == 5:
            self.known_good = step

    monkeypatch.setattr(Integrity, "before_update", look)
    with pytest.raises(CorruptionError, match="rank 1 differs"):
        config = toy_config()
        toy_trainer(replace(config, checkpoint=replace(config.checkpoint, keep=keep)), tmp_path).run()
    assert steps(tmp_path) == kept


def test_one_kept_checkpoint_is_enough_to_leave_the_newest_state_of_which_a_check_said_it_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved at every step, checked at every third, and found different before step 12: back to step 9, not to 0."""
    compared = Integrity.before_update

    def look(self: Integrity, step: int) -> None:
        compared(self, step)
        if step == 11:
            raise CorruptionError(Corruption(step + 1, REPLICAS, (1,), "rank 1 differs"))

    monkeypatch.setattr(Integrity, "before_update", look)
    config = toy_config()
    launch, checkpoint = replace(config.launch, verify_every=3), replace(config.checkpoint, interval=1, keep=1)
    with pytest.raises(CorruptionError):
        toy_trainer(replace(config, launch=launch, checkpoint=checkpoint), tmp_path).run()
    assert steps(tmp_path) == [9]


RECOMPUTED = replace(toy_config(), launch=replace(toy_config().launch, recompute_every=4, verify_every=0))
"""One random step in four is computed twice."""


def computed(monkeypatch: pytest.MonkeyPatch, flipped: int | None = None) -> Counter[int]:
    """How often each step is computed from now on, the step `flipped` with one bit of a gradient wrong at last."""
    times, step = Counter[int](), ToyLearner.step

    def counted(self: ToyLearner, rows: Tensor, mtp: float, balance: float, label: str) -> Losses:
        number = int(label.removeprefix("step "))
        times[number] += 1
        losses = step(self, rows, mtp, balance, label)
        if (number, times[number]) == (flipped, 2):
            piece = next(piece for piece in self.reduction.pieces if piece.name == "experts.weight")
            assert piece.tensor.grad is not None
            piece.tensor.grad.view(-1).view(torch.int32)[3] ^= 1
        return losses

    monkeypatch.setattr(ToyLearner, "step", counted)
    return times


def test_a_clean_run_with_steps_computed_twice_is_the_same(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, recorder = computed(monkeypatch), Recorder()
    assert toy_trainer(RECOMPUTED, tmp_path, recorder).run().finished
    twice = [step for step, count in times.items() if count == 2]
    assert sorted(times) == list(range(1, 13))
    assert [(step - 1) // 4 for step in twice] == [0, 1, 2]
    assert set(times.values()) == {1, 2}
    assert recorder.of("corruption") == []
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("window", [1, 2])
def test_a_gradient_that_comes_out_different_is_noticed_and_undone(
    window: int, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    integrity = Integrity(ToyLearner(ToyModel(), RECOMPUTED), NoMoments(), RECOMPUTED.launch, RECOMPUTED.seed.data)
    number = next(step for step in range(4 * window, 4 * window + 4) if integrity.recomputes(step)) + 1
    recorder, model = Recorder(), ToyModel()
    with monkeypatch.context() as patched:
        computed(patched, flipped=number)
        with pytest.raises(CorruptionError, match=r"the summed gradient of experts\.weight of the step came out diff"):
            toy_trainer(RECOMPUTED, tmp_path, recorder, model).run()
    (found,) = recorder.of("corruption")
    assert (found["step"], found["check"], found["ranks"]) == (number, RECOMPUTATION, [0])
    assert len(model.bias_updates) == number - 1, "it was not applied"
    assert steps(tmp_path) == [step for step in (4, 8) if step < number - 1], (
        "nor is what was saved right before it kept"
    )
    assert toy_trainer(RECOMPUTED, tmp_path).run().finished
    assert_same_end(tmp_path, undisturbed)


class NoMoments:
    """An optimizer that keeps nothing."""

    def moments(self) -> list[Piece]:
        return []
