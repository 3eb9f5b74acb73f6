"""The rows of `headrace plan` against figures that come from elsewhere."""

import pytest

from headrace.config.compose import load
from headrace.model.transformer import Transformer
from headrace.parallel.shards import pieces_of
from headrace.planning.describe import Simulated, layout, optimizer_bytes, plan, scaled, text_table
from headrace.planning.parameters import count
from headrace.training.optimizer import Optimizer


def test_the_published_model():
    rows = dict(
        plan(
            load(["experiment=tiny", "model=v3_671b", "recipe.sequence_length=4096", "recipe.tokens=1e9"]),
            688_574_839_360,
        )
    )
    assert rows["parameters"].startswith("671,026,404,352 (671.03B)")
    assert "36.63B" in rows["activated per token"]
    assert rows["FLOPs per token"].startswith("250.4 G")
    assert rows["FLOPs per token with MTP"].startswith("260.6 G")
    assert "11.61B" in rows["MTP module"]
    assert rows["exported model"] == "688.6 GB in BF16"


def test_the_run_is_steps_times_tokens_times_flops():
    config = load(["experiment=tiny", "recipe.tokens=100000"])
    rows = dict(plan(config, 0))
    step = config.recipe.sequence_length * config.recipe.batch_sequences
    steps = 100_000 // step
    assert rows["steps"].startswith(f"{steps:,} of ")
    assert rows["training tokens"].startswith(f"{steps * step:,}")
    per_token = rows["FLOPs per token with MTP"].split()
    run = rows["FLOPs of the run"].split()
    units = {"M": 1e6, "G": 1e9, "T": 1e12}
    assert float(run[0]) * units[run[1].rstrip(",")] == pytest.approx(
        float(per_token[0]) * units[per_token[1]] * steps * step, rel=1e-3
    )


def test_a_model_without_mtp_has_no_row_for_it():
    rows = dict(plan(load(["experiment=tiny", "model.num_nextn_predict_layers=0"]), 0))
    assert not any("MTP" in label for label in rows)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_optimizer_bytes_are_those_of_its_tensors(name, moments):
    config = load(["experiment=tiny", f"recipe.optimizer.name={name}", f"precision.optimizer_moments={moments}"])
    network = Transformer(config.model, "fp32")
    optimizer = Optimizer(pieces_of(network.named_parameters()), config.recipe.optimizer, config.precision)
    held = sum(piece.tensor.nbytes for piece in optimizer.moments())
    assert optimizer_bytes(config, count(config.model)) == held


def test_the_table_aligns_its_values():
    rows = plan(load(["experiment=tiny"]), 5)
    begin = max(len(label) for label, _ in rows) + 2
    assert [(line[:begin].strip(), line[begin:]) for line in text_table(rows).splitlines()] == rows


def test_buffers_are_those_of_a_microbatch_in_the_compute_dtype():
    words = ["recipe.sequence_length=128", "model.hidden_size=64", "parallel=dualpipe", "parallel.microbatch=2"]
    simulated = Simulated("dualpipe", "as configured", 4, 13, 1.3, 3, 5)
    rows = dict(layout(load(["experiment=tiny", *words]), simulated))
    assert rows["receive buffers"] == "5 of 32.77 kB in BF16, 163.8 kB"  # 2 * 128 * 64 * 2 bytes
    assert rows["idle share"].startswith("10.0 %, 1.3 F of 13 F")
    assert rows["microbatches"] == "4 of 2 x 128 tokens"
    rows = dict(layout(load(["experiment=tiny", *words, "precision=fp32"]), simulated))
    assert rows["receive buffers"] == "5 of 65.54 kB in FP32, 327.7 kB"


@pytest.mark.parametrize(
    ("number", "text"), [(250.4e9, "250.4 G"), (999, "999 "), (3.3e24, "3.3 Y"), (1000, "1 k"), (0, "0 ")]
)
def test_scaled(number, text):
    assert scaled(number) == text
