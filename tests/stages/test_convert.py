"""convert and evaluate of a run with two phases and a moving average: which weights, network and comparisons."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from headrace.checkpoint.reader import tensors_of
from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.planning.describe import run_flops
from headrace.planning.flops import training_flops
from headrace.stages import convert, evaluate, pretrain
from headrace.stages.places import Place, places
from headrace.stages.run import main
from headrace.tokens.loader import Batches, TokenDataset
from small_corpus import tokenized

YARN = (
    "{type:yarn,factor:4.0,beta_fast:32.0,beta_slow:1.0,mscale:1.0,mscale_all_dim:1.0,"
    "original_max_position_embeddings:64}"
)
LONGER = f"{{name:longer,steps:5,sequence_length:64,batch_sequences:2,learning_rate:1e-4,rope_scaling:{YARN}}}"
SMALL = (
    "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "recipe.sequence_length=16", "recipe.batch_sequences=8",
    f"recipe.tokens={128 * 20}", f"recipe.extensions=[{LONGER}]", "recipe.ema_decay=0.8", "evaluate.tasks=[]",
    "evaluate.samples=0", "train.validate_every=20", "train.validation_rows=3", "checkpoint.interval=10",
    "checkpoint.keep=9", "launch.threads=1", "launch.device=cpu", "convert.dtype=fp32", "recipe.batch_ramp=null",
)  # fmt: skip
BODY = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    words = tokenized(tmp_path_factory.mktemp("phases"), SMALL)
    assert main(pretrain.DOOR, words) == 0
    return words


def place(words: list[str], stage: str) -> Place:
    config = load(words)
    return places(config, known_lock(config).hash)[stage]


def converted(words: list[str]) -> Path:
    assert main(convert.DOOR, words) == 0
    return place(words, "convert").artifact


def exported(folder: Path, name: str) -> torch.Tensor:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return load_file(folder / index[name])[name]


def weights(words: list[str], folder: str, kind: str) -> torch.Tensor:
    with tensors_of(place(words, "pretrain").folder / folder, kind) as source:
        return source.get(BODY)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_the_last_phases_network_and_weights_are_exported(trained: list[str]) -> None:
    folder = converted(trained)
    assert torch.equal(exported(folder, BODY), weights(trained, "artifact/checkpoint", "model"))
    assert torch.equal(exported(folder, BODY), weights(trained, "checkpoints/step-00000025", "model"))
    found = config_of(folder)
    assert found["rope_parameters"]["rope_type"] == "yarn" and found["rope_scaling"]["factor"] == 4.0
    assert found["max_position_embeddings"] >= 4 * 64


def test_a_kept_step_has_the_network_of_its_own_phase(trained: list[str]) -> None:
    folder = converted([*trained, "convert.step=20"])
    assert config_of(folder)["rope_parameters"]["rope_type"] == "default"
    assert torch.equal(exported(folder, BODY), weights(trained, "checkpoints/step-00000020", "model"))


def test_the_moving_average_is_exported_in_place_of_the_weights(trained: list[str]) -> None:
    folder = converted([*trained, "convert.weights=ema"])
    average, last = weights(trained, "artifact/checkpoint", "ema"), weights(trained, "artifact/checkpoint", "model")
    assert torch.equal(exported(folder, BODY), average)
    assert 0 < (average - last).abs().max() < 0.1 * last.abs().max()


@pytest.mark.parametrize(
    ("chosen", "compared"), [([], 3), (["convert.weights=ema"], 1), (["convert.step=20"], 1)], ids=["last", "ema", "20"]
)
def test_in_memory_results_are_compared_with_the_last_weights_only(
    trained: list[str], chosen: list[str], compared: int
) -> None:
    words = [*trained, *chosen]
    converted(words)
    assert main(evaluate.DOOR, words) == 0
    run = place(words, "evaluate")
    found = json.loads((run.artifact / "results.json").read_text())["agreement"]
    assert found["passed"] and len(found["comparisons"]) == compared
    said = "in-memory results are the last weights' and are not compared" in run.log.read_text()
    assert said == bool(chosen)


@pytest.mark.parametrize("file", ["model-00000.safetensors", "slices.json"])
def test_a_flipped_bit_is_named_and_nothing_is_converted(
    trained: list[str], capsys: pytest.CaptureFixture[str], file: str
) -> None:
    words = [*trained, "convert.max_shard_bytes=9000000"]
    path = place(words, "pretrain").artifact / "checkpoint" / file
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.unlink()  # the run's own checkpoint is another link to it
    path.write_bytes(damaged)
    try:
        assert main(convert.DOOR, words) == 2
    finally:
        path.write_bytes(whole)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"artifact/checkpoint/{file}" in line and "damaged" in line
    assert not place(words, "convert").artifact.exists()


class Ran:
    """What `training_rows` asks of a run."""

    def __init__(self, words: list[str]) -> None:
        self.config, self.inputs = load(words), dict[str, str]()
        self._words = words

    def input(self, parent: str, quick: bool = False) -> Path:
        return place(self._words, parent).artifact


def test_baselines_get_the_rows_that_were_read_those_of_the_longer_phase_cut(trained: list[str]) -> None:
    run: Any = Ran(trained)
    assert evaluate.rows_read(run) == {16: 160, 64: 10}
    tokens = place(trained, "tokenize").artifact
    rows = evaluate.training_rows(run, tokens)
    train, seed = TokenDataset(tokens).split("train"), run.config.seed.data
    long = Batches(train, seed, 64, 1).batch(0, 10).numpy()
    assert rows.shape == (160 + 4 * 10, 17)
    assert np.array_equal(rows[:160], Batches(train, seed, 16, 1).batch(0, 160).numpy())
    for row in range(10):
        assert np.array_equal(rows[170 + row], long[row, 16:33])
    assert evaluate.rows_read(Ran([*trained, "convert.step=20"])) == {16: 160}  # type: ignore[arg-type]


def test_operations_are_counted_phase_by_phase(trained: list[str]) -> None:
    config = load(trained)
    short, long = (training_flops(config.model, length, mtp=True) for length in (16, 64))
    assert run_flops(config, 20) == pytest.approx(20 * 128 * short)
    assert run_flops(config) == run_flops(config, 25) == pytest.approx(20 * 128 * short + 5 * 128 * long)
    assert run_flops(config, 7) == pytest.approx(7 * 128 * short)
