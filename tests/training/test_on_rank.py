"""One rank's part of a run: what its dataset and its configuration say reaches the engine."""

import logging
from pathlib import Path

import numpy as np
import pytest

from headrace.artifacts.files import write_json
from headrace.config.compose import load
from headrace.launch.deadline import StopRequested
from headrace.model.initialisation import initialise
from headrace.model.transformer import Transformer
from headrace.tokens.plan import Unit
from headrace.tokens.shards import Encoded, finish, write_shard
from headrace.training.on_rank import Job, train
from headrace.training.place import Place, Watchers
from headrace.training.rows import open_rows
from toy_run import Recorder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 16 tokens, two in a row of 32."""
    folder, generator = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    inputs = {"tokenizer": "t", "eos": 1, "vocab_size": 999, "row_lengths": [32]}
    units = [Unit(split, 0, 1) for split in ("train", "validation", "heldout")]
    for unit in units:
        tokens = generator.integers(2, 999, 64 * 16, dtype=np.int32)
        tokens[15::16] = 1
        facts = write_shard(folder / unit.name, [Encoded(tokens, np.full(64, 16, dtype=np.int32), 64)], [32])
        write_json(folder / f"{unit.name}.json", {"inputs": inputs, "counts": {}, **facts})
    finish(folder, units)
    return folder


@pytest.mark.parametrize("masked", [False, True])
def test_documents_see_each_other_unless_train_mask_documents_is_set(
    masked: bool, dataset: Path, tmp_path: Path
) -> None:
    config = load(
        [
            "experiment=tiny", "precision=fp32", "recipe.sequence_length=32", "recipe.batch_sequences=4",
            "recipe.batch_ramp=null", "recipe.extensions=[]", "recipe.tokens=1280", "tracking.log_every=1",
            "launch.threads=1", "launch.device=cpu", f"train.mask_documents={str(masked).lower()}",
        ]
    )  # fmt: skip
    recorder = Recorder(stop_after=1)
    watchers = Watchers(recorder, logging.getLogger("headrace.test"), recorder, recorder, recorder.event)
    with pytest.raises(StopRequested):
        train(Job(config, dataset, tmp_path, Place(tmp_path / "checkpoints", "0" * 12, 1e6, None)), watchers)
    model = Transformer(config.model, "fp32")
    initialise(model, config.model, config.seed.init)
    rows = open_rows(dataset, config).batch(0, 4)[:, :32]
    texts = rows.reshape(8, 16) if masked else rows
    expected = -model.token_log_probabilities(texts).mean().item()
    (first,) = (metrics["loss"] for step, metrics in recorder.logged if "loss" in metrics)
    assert first == pytest.approx(expected, rel=1e-5)
    assert abs(expected + model.token_log_probabilities(rows if masked else rows.reshape(8, 16)).mean()) > 1e-4
