"""The moving average of the weights against its definition in float64, and over stops and resumes."""

from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from torch import Tensor

from headrace.checkpoint.reader import tensors_of
from headrace.config.schema import Config
from headrace.parallel.shards import Piece, pieces_of
from headrace.training.ema import Ema
from toy_run import Recorder, ToyModel, assert_same_end, frozen, poisoned, toy_batch, toy_config, toy_trainer

DECAY = 0.9


def definition(values: list[Tensor], decay: float) -> Tensor:
    """Sum of d^(n-i) w_i over i, times (1 - d) / (1 - d^n), in float64."""
    n = len(values)
    total = sum(decay ** (n - i) * value.double() for i, value in enumerate(values, 1))
    return total * (1 - decay) / (1 - decay**n)  # type: ignore[no-any-return]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_the_weighted_mean_of_all_weights_so_far(decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(64, 32, generator=generator), torch.zeros(4)
    ema = Ema([Piece("weight", weight[8:24], (64, 32), 8 * 32), *pieces_of([("bias", bias)])], decay)
    seen = []
    for _ in range(50):
        ema.wait()
        weight += 0.1 * torch.randn(64, 32, generator=generator)
        bias += 0.001
        seen.append((weight[8:24].clone(), bias.clone()))
        ema.begin()
    for piece, values in zip(ema.pieces(), zip(*seen, strict=True), strict=True):
        expected = definition(list(values), decay)
        assert piece.tensor.dtype == torch.float32
        assert (piece.tensor.double() - expected).abs().max() < 2e-6 * expected.abs().max()
    assert [(piece.name, piece.shape, piece.start) for piece in ema.pieces()] == [
        ("weight", (64, 32), 256), ("bias", (4,), 0),
    ]  # fmt: skip


def test_it_is_computed_beside_the_step_that_follows() -> None:
    """`begin` returns while the thread is held up; whoever needs the average waits."""
    weight, go_on = torch.ones(4), Event()
    ema = Ema(pieces_of([("weight", weight)]), DECAY)
    (average,) = (piece.tensor for piece in ema.pieces())
    ema._thread.submit(go_on.wait)
    ema.begin()
    assert average.tolist() == [0.0] * 4
    waiting = Thread(target=ema.wait)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    go_on.set()
    waiting.join(10)
    assert not waiting.is_alive()
    torch.testing.assert_close(average, weight)


class Watching(Recorder):
    """Keeps the weights after every step."""

    def __init__(self, model: ToyModel) -> None:
        super().__init__()
        self.model, self.weights = model, list[dict[str, Tensor]]()

    def update(self, step: int, *rest: object) -> None:
        super().update(step, *rest)  # type: ignore[arg-type]
        self.weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})


@pytest.fixture
def config() -> Config:
    base = toy_config(20)
    return replace(base, recipe=replace(base.recipe, ema_decay=DECAY))


def test_a_run_keeps_it_over_applied_steps(config: Config, tmp_path: Path) -> None:
    model = ToyModel()
    watching = Watching(model)
    toy_trainer(config, tmp_path, watching, model, poisoned({4 * 6})).run()
    applied = [weights for step, weights in enumerate(watching.weights, 1) if step != 7]
    tensors, state = frozen(tmp_path)
    assert state["ema"] == {"updates": 19}
    for name in model.state_dict():
        expected = definition([weights[name] for weights in applied], DECAY)
        torch.testing.assert_close(tensors[f"ema {name}"].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stops", [(1,), (7, 2), (13, 1, 1)])
def test_stopped_and_resumed_it_is_bitwise_equal(config: Config, tmp_path: Path, stops: tuple[int]) -> None:
    toy_trainer(config, tmp_path / "straight").run()
    for stop in stops:
        toy_trainer(config, tmp_path / "broken", Recorder(stop)).run()
    toy_trainer(config, tmp_path / "broken").run()
    assert_same_end(tmp_path / "broken", tmp_path / "straight")


def test_it_changes_nothing_in_the_run(config: Config, tmp_path: Path) -> None:
    toy_trainer(config, tmp_path / "with").run()
    toy_trainer(toy_config(20), tmp_path / "without").run()
    ours, theirs = (frozen(tmp_path / name)[0] for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_artifact_has_it_and_its_loss(config: Config, tmp_path: Path) -> None:
    model, folder = ToyModel(), tmp_path / "artifact"
    folder.mkdir()
    trainer = toy_trainer(config, tmp_path / "checkpoints", model=model)
    trainer.run()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.write_results(folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with tensors_of(folder / "checkpoint", "ema") as source:
        model.load_state_dict({name: source.get(name) for name in source.keys()})  # noqa: SIM118 - no mapping
    with torch.no_grad():
        expected = model.losses(toy_batch(5000, 3)).main.item()
    summary = trainer.summary()
    assert summary["validation_loss_ema"] == pytest.approx(expected, rel=1e-6)
    assert summary["validation_loss_ema"] != summary["validation_loss"]
