"""The rows of `headrace plan` against figures that come from elsewhere."""

import pytest

from headrace.config.compose import load
from headrace.model.transformer import Transformer
from headrace.parallel.shards import pieces_of
from headrace.planning.describe import Simulated, layout, optimizer_bytes, phase_layout, plan, scaled, text_table
from headrace.planning.flops import training_flops
from headrace.planning.parameters import count
from headrace.recipe.schedule import Schedule
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


def flops(text):
    number, unit = text.split(",")[0].split()
    return float(number) * {"M": 1e6, "G": 1e9, "T": 1e12, "Y": 1e24}[unit]


def test_the_run_is_steps_times_tokens_times_flops():
    words = ["recipe.tokens=100000", "recipe.batch_ramp=null", "recipe.extensions=[]"]
    config = load(["experiment=tiny", *words])
    rows = dict(plan(config, 0))
    step = config.recipe.sequence_length * config.recipe.batch_sequences
    steps = 100_000 // step
    assert rows["steps"].startswith(f"{steps:,} of ")
    assert rows["training tokens"].startswith(f"{steps * step:,}")
    per_token = flops(rows["FLOPs per token with MTP"].replace(" causal", ""))
    assert flops(rows["FLOPs of the run"]) == pytest.approx(per_token * steps * step, rel=1e-3)
    assert not any(label.startswith(" ") for label in rows)  # one phase, no rows for phases


def test_the_phases_of_the_published_run():
    config = load(["experiment=v3_671b"])
    rows = dict(plan(config, 0))
    assert rows["  main"] == "227,784 of 15,360 x 4,096 tokens, 14.33 T tokens"
    assert rows["  ramp"].startswith("15,314 of 3,072 to 15,104 x 4,096 tokens")
    assert rows["  context_128k"] == "1,000 of 480 x 131,072 tokens, YaRN factor 40, 62.91 G tokens"
    short = 14_799_956_082_688 * training_flops(config.model, 4096, mtp=True)
    longer = 62_914_560_000 * sum(training_flops(config.model, length, mtp=True) for length in (32_768, 131_072))
    assert flops(rows["FLOPs of the run"]) == pytest.approx(short + longer, rel=1e-3)


def test_a_phase_with_another_layout_has_a_row():
    config = load(["experiment=v3_671b"])
    ramp = Schedule(config.recipe).phases[0]
    least, most = (Simulated("zb1p", "as configured", n, 100, idle, 3, 5) for n, idle in ((24, 20), (118, 4)))
    assert phase_layout(config, ramp, least, most) == (
        "  ramp",
        "pipeline 16 x data 128, expert 64, zb1p: 24 to 118 microbatches of 1 x 4,096 tokens, idle 20.0 % to 4.0 %",
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
    assert [(line[:begin].rstrip(), line[begin:]) for line in text_table(rows).splitlines()] == rows


def test_buffers_are_those_of_a_microbatch_in_the_compute_dtype():
    words = ["recipe.sequence_length=128", "model.hidden_size=64", "parallel=dualpipe", "parallel.microbatch=2",
             "recipe.batch_ramp=null", "recipe.extensions=[]"]  # fmt: skip
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
