"""convert and evaluate of a run with two phases and a moving average: which weights, network and comparisons."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from headrace.artifacts.manifest import verify
from headrace.checkpoint.reader import tensors_of
from headrace.config.compose import load
from headrace.conversion import shards
from headrace.corpus.sources import known_lock
from headrace.model.loss import inputs_of
from headrace.planning.describe import run_flops
from headrace.planning.flops import training_flops
from headrace.stages import convert, evaluate, pretrain
from headrace.stages.places import Place, places
from headrace.stages.run import main
from headrace.training.rows import open_rows
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
    assert found["max_position_embeddings"] == 4 * 64  # transformers expects that the two agree


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


class Killed(BaseException):
    """In place of a signal."""


def stop_in_the_third(patched: pytest.MonkeyPatch) -> None:
    write = shards.write_shard

    def stopping(plan: Any, file: str, *given: Any) -> None:
        if file.startswith("model-00003"):
            raise Killed
        write(plan, file, *given)

    patched.setattr(shards, "write_shard", stopping)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_a_conversion_that_was_cut_off_goes_on(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*trained, "convert.max_shard_bytes=200000"]
    run = place(words, "convert")
    with monkeypatch.context() as patched:
        stop_in_the_third(patched)
        assert main(convert.DOOR, words) == 1
    assert convert.finished_shards(run.folder) == 2 and not run.artifact.exists()
    before = inodes(run.folder / "shards")
    assert len(before) == 2
    folder = converted(words)
    assert inodes(folder).items() > before.items()
    verify(folder)
    assert not (run.folder / "shards").exists() and not (run.folder / "shards.json").exists()


def of_source(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = convert.program(words)
    return code, capsys.readouterr().err.strip()


def test_a_folder_is_converted_without_a_run(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = converted(trained)
    words = (f"source={source}", f"paths.results={tmp_path}", "convert.dtype=bf16", "convert.max_shard_bytes=200000")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_in_the_third(patched)
        convert.program(words)
    (run,) = (tmp_path / "convert").iterdir()
    before = inodes(run / "artifact.partial")
    assert len(before) == 2
    code, said = of_source(capsys, *words)
    assert code == 0 and "in BF16, verified" in said and str(run / "artifact") in said
    found = verify(run / "artifact")
    assert found.kind == "convert" and found.summary["dtype"] == "bf16"
    assert inodes(run / "artifact").items() > before.items()
    assert torch.equal(exported(run / "artifact", BODY), exported(source, BODY).bfloat16())
    assert {path.name for path in run.iterdir()} >= {"artifact", "stage.json", "provenance.json"}
    assert not (run / "shards.json").exists() and not (run / "artifact.partial").exists()
    code, said = of_source(capsys, *words)
    assert code == 0 and "already finished" in said
    back = (f"source={run / 'artifact'}", f"paths.results={tmp_path}", "convert.dtype=fp8")
    code, said = of_source(capsys, *back)
    assert code == 0 and "in FP8, verified" in said
    runs = set((tmp_path / "convert").iterdir())
    assert len(runs) == 2
    (fp8,) = runs - {run}
    code, said = of_source(capsys, f"source={fp8 / 'artifact'}", *back[1:])
    assert code == 2 and "is FP8 already" in said and set((tmp_path / "convert").iterdir()) == runs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source=/no/such/folder"], "no such folder"),
        (["source={}", "convert.step=3"], "convert.step and convert.weights are for a run's weights"),
        (["source={}", "convert.dtype=int4"], "convert.dtype"),
        (["source={}"], "config.json: no such file"),
    ],
)
def test_a_source_that_cannot_be_converted_is_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.format(tmp_path / "empty") for word in words]
    code, said = of_source(capsys, *words, f"paths.results={tmp_path / 'results'}")
    assert code == 2 and message in said and said.count("\n") == 0
    assert not (tmp_path / "results").exists()


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
    usual = inputs_of(open_rows(tokens, run.config).batch(0, 160)[:, :17]).numpy()
    long = inputs_of(open_rows(tokens, run.config, "longer").batch(0, 10)[:, :65]).numpy()
    assert rows.shape == (160 + 4 * 10, 17)
    assert np.array_equal(rows[:160], usual)
    for row in range(10):
        assert np.array_equal(rows[170 + row], long[row, 16:33])
    assert evaluate.rows_read(Ran([*trained, "convert.step=20"])) == {16: 160}  # type: ignore[arg-type]


def test_operations_are_counted_phase_by_phase(trained: list[str]) -> None:
    config = load(trained)
    short, long = (training_flops(config.model, length, mtp=True) for length in (16, 64))
    assert run_flops(config, 20) == pytest.approx(20 * 128 * short)
    assert run_flops(config) == run_flops(config, 25) == pytest.approx(20 * 128 * short + 5 * 128 * long)
    assert run_flops(config, 7) == pytest.approx(7 * 128 * short)
