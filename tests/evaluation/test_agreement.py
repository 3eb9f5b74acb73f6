from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from conversion_models import part_of, sliced
from evaluation_world import World
from headrace.artifacts.tensors import load_tensors, save_tensors
from headrace.config.compose import load
from headrace.conversion.export import export
from headrace.errors import UserError
from headrace.evaluation import agreement
from headrace.evaluation.scorer import TransformerScorer, TransformersScorer
from headrace.fp8.numerics import Numerics


def measured(world: World, dtype: str = "bf16") -> dict[str, Any]:
    scorer = TransformersScorer.load(world.hub)
    return agreement.measure(world.agreement, world.checkpoint, world.hub, world.config, "bf16", dtype, scorer)


def copied(world: World, folder: Path) -> World:
    folder.mkdir()
    for file in world.hub.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return replace(world, hub=folder)


def test_three_forms_of_one_model_agree(world: World) -> None:
    result = measured(world)
    reloaded, exported, precision = result["comparisons"]
    assert result["passed"] and reloaded["identical"] and reloaded["largest"] == 0
    assert 0 < exported["largest"] < 1e-5 and exported["line"] == 1e-4 and exported["tied_rows"] == 0
    assert precision["line"] is None and precision["largest"] >= precision["mean"] > exported["mean"]
    assert result["weights_compared"] > 10_000
    agreement.require(result)


def test_an_fp32_export_agrees_too(world: World, tmp_path: Path) -> None:
    export(world.checkpoint, world.config, world.tokenizer, tmp_path / "hub", "fp32", 1 << 30)
    result = measured(replace(world, hub=tmp_path / "hub"), "fp32")
    assert result["passed"]


def test_an_fp8_export_agrees_by_the_same_line_and_its_rounding_is_printed(world: World, tmp_path: Path) -> None:
    export(world.checkpoint, world.config, world.tokenizer, tmp_path / "hub", "fp8", 1 << 30)
    result = measured(replace(world, hub=tmp_path / "hub"), "fp8")
    reloaded, exported, precision = result["comparisons"]
    assert result["passed"] and reloaded["identical"]
    assert "rounded to fp8" in exported["compared"] and exported["line"] == 1e-4 and exported["largest"] < 2e-5
    assert precision["line"] is None and precision["mean"] > 1e-3
    tensors = load_tensors(world.agreement)
    rows = TransformersScorer.load(tmp_path / "hub").log_probabilities(tensors["tokens"])
    rows = (rows - tensors["log_probabilities"]).double().mean(1).numpy()
    expected = stats.ttest_1samp(rows, 0).confidence_interval(0.95)  # what FP8 costs per token, row by row
    assert precision["shift"]["value"] == pytest.approx(rows.mean(), abs=1e-7)
    assert precision["shift"]["low"] == pytest.approx(expected.low, abs=1e-6)
    assert precision["shift"]["high"] == pytest.approx(expected.high, abs=1e-6)
    assert precision["shift"]["units"] == len(rows) and reloaded["shift"]["value"] == 0


def test_a_model_trained_in_fp8_is_reloaded_in_fp8(world: World, tmp_path: Path) -> None:
    precision = load(["experiment=tiny", "precision=fp8", "precision.fp8.backend=reference"]).precision
    numerics = Numerics.resolve(precision, torch.device("cpu"))
    in_memory = TransformerScorer.load(world.checkpoint, world.config, numerics)
    tokens = load_tensors(world.agreement)["tokens"]
    scores = torch.cat([in_memory.log_probabilities(row[None]) for row in tokens])
    save_tensors(tmp_path / "agreement.safetensors", {"tokens": tokens, "log_probabilities": scores})
    export(world.checkpoint, world.config, world.tokenizer, tmp_path / "hub", "fp8", 1 << 30)
    paths = (tmp_path / "agreement.safetensors", world.checkpoint, tmp_path / "hub")
    scorer = TransformersScorer.load(tmp_path / "hub")
    result = agreement.measure(*paths, world.config, numerics, "fp8", scorer)
    assert result["passed"] and result["comparisons"][0]["identical"]
    assert result["comparisons"][2]["compared"] == "in memory (fp8) / exported, FP32"
    assert not agreement.measure(*paths, world.config, "bf16", "fp8", scorer)["passed"]


def test_one_altered_scale_stops_the_stage(world: World, tmp_path: Path) -> None:
    export(world.checkpoint, world.config, world.tokenizer, tmp_path / "hub", "fp8", 1 << 30)
    shard = next((tmp_path / "hub").glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.1.self_attn.o_proj.weight_scale_inv"] *= 1 + 2**-20
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.o_proj\.weight_scale_inv differs"):
        measured(replace(world, hub=tmp_path / "hub"), "fp8")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"]
)
def test_one_altered_exported_weight_stops_the_stage(world: World, tmp_path: Path, name: str) -> None:
    broken = copied(world, tmp_path / "hub")
    shard = next(broken.hub.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[name].view(torch.int16)[0, 5] ^= 1  # the lowest bit of one number
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        measured(broken)


def test_altered_weights_also_show_token_by_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second line of defence, with the comparison of weights out of the way."""
    scorer = TransformersScorer.load(world.hub)
    with torch.no_grad():
        scorer.model.model.layers[1].self_attn.o_proj.weight[0, 0] += 0.5
    result = agreement.measure(world.agreement, world.checkpoint, world.hub, world.config, "bf16", "bf16", scorer)
    assert not result["passed"] and result["comparisons"][0]["passed"] and not result["comparisons"][1]["passed"]
    with pytest.raises(agreement.DisagreementError, match="exported"):
        agreement.require(result)


def test_a_checkpoint_that_is_not_the_model_in_memory_fails(world: World, tmp_path: Path) -> None:
    tensors = load_tensors(world.agreement)
    tensors["log_probabilities"][2, 7] += 1e-3
    save_tensors(tmp_path / "agreement.safetensors", tensors)
    result = measured(replace(world, agreement=tmp_path / "agreement.safetensors"))
    assert not result["passed"] and not result["comparisons"][0]["identical"]
    with pytest.raises(agreement.DisagreementError, match="in memory / reloaded"):
        agreement.require(result)


def test_an_earlier_step_is_compared_with_its_own_export_only(world: World, tmp_path: Path) -> None:
    tensors = load_tensors(world.agreement)
    tensors["log_probabilities"] -= 0.5  # the end of training was another model
    save_tensors(tmp_path / "agreement.safetensors", tensors)
    arguments = (tmp_path / "agreement.safetensors", world.checkpoint, world.hub, world.config, "bf16", "bf16")
    scorer = TransformersScorer.load(world.hub)
    result = agreement.measure(*arguments, scorer, final=False)
    assert result["passed"] and [entry["line"] for entry in result["comparisons"]] == [1e-4]
    assert not agreement.measure(*arguments, scorer, final=True)["passed"]


def test_a_malformed_agreement_file_is_named(world: World, tmp_path: Path) -> None:
    tensors = load_tensors(world.agreement)
    save_tensors(
        tmp_path / "a.safetensors",
        {"tokens": tensors["tokens"], "log_probabilities": tensors["log_probabilities"][:, 1:]},
    )
    with pytest.raises(UserError, match=r"a\.safetensors"):
        measured(replace(world, agreement=tmp_path / "a.safetensors"))


def test_a_router_tie_excuses_its_row_from_there_on_and_nothing_else() -> None:
    first, second = torch.zeros(8, 5), torch.zeros(8, 5)
    second[2, 3:] = 0.1
    gaps = torch.full((8, 5), 0.01)
    unexcused = agreement._compare("x", first, second, 1e-4, gaps)
    assert not unexcused.passed and unexcused.tied_rows == 0
    gaps[2, 4] = 1e-8  # a tie after the first difference explains nothing
    assert not agreement._compare("x", first, second, 1e-4, gaps).passed
    gaps[2, 1] = 1e-8  # before it: attention carries it on
    excused = agreement._compare("x", first, second, 1e-4, gaps)
    assert excused.passed and excused.tied_rows == 1 and excused.largest == 0
    second[5:] = 0.1
    gaps[5:] = 1e-8
    assert not agreement._compare("x", first, second, 1e-4, gaps).passed  # half of the rows: no accident any more
    second[:] = float("nan")
    assert not agreement._compare("x", first, second, 1e-4).passed


def test_a_routers_choice_stands_while_scores_move_by_less_than_the_gap(world: World) -> None:
    """Against a router written with Python's sort, which finds the same choice and the same gap."""
    router = TransformersScorer.load(world.hub).model.model.layers[1].mlp.gate
    hidden = torch.randn(64, world.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, _, chosen = router(hidden)
        gaps = agreement._gap(router, logits)
    for scores, gap, experts in zip(logits.sigmoid(), gaps.tolist(), chosen.tolist(), strict=True):
        biased = (scores + router.e_score_correction_bias).tolist()
        assert sorted_choice(router, biased) == (set(experts), pytest.approx(gap, abs=1e-6)) and gap > 0
        against = [score + (-0.24 if expert in experts else 0.24) * gap for expert, score in enumerate(biased)]
        assert sorted_choice(router, against)[0] == set(experts)


def sorted_choice(router: Any, biased: list[float]) -> tuple[set[int], float]:
    """Group-limited top-k, and the smaller of the distances to the next group and the next expert."""
    size = len(biased) // router.num_group
    group_scores = [sum(sorted(biased[start : start + size])[-2:]) for start in range(0, len(biased), size)]
    ranked = sorted(range(router.num_group), key=lambda group: -group_scores[group])
    best = ranked[: router.topk_group]
    experts = sorted((e for e in range(len(biased)) if e // size in best), key=lambda expert: -biased[expert])
    last, next_ = experts[router.top_k - 1], experts[router.top_k]
    between_groups = group_scores[best[-1]] - group_scores[ranked[router.topk_group]]
    return set(experts[: router.top_k]), min(between_groups, biased[last] - biased[next_])


def test_a_folder_of_slices_is_judged_like_a_file_and_its_average_by_its_own_export(
    world: World, tmp_path: Path
) -> None:
    weights = load_file(world.checkpoint)
    average = {name: tensor * 0.9 for name, tensor in weights.items()}
    whole = sliced(tmp_path, model=weights, ema=average)
    folder = part_of(whole, tmp_path / "checkpoint", "model", "ema")
    plain, cut = measured(world), measured(replace(world, checkpoint=folder))
    assert plain == cut and cut["passed"] and len(cut["comparisons"]) == 3
    export(folder, world.config, world.tokenizer, tmp_path / "hub", "bf16", 1 << 30, kind="ema")
    arguments = (world.agreement, folder, tmp_path / "hub", world.config, "bf16", "bf16")
    scorer = TransformersScorer.load(tmp_path / "hub")
    result = agreement.measure(*arguments, scorer, final=False, kind="ema")
    assert result["passed"] and [entry["line"] for entry in result["comparisons"]] == [1e-4]
    assert not agreement.measure(*arguments, scorer, kind="ema")["passed"]
