from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_models import EDGES, LIKE_V3, our_network
from evaluation_world import LENGTH, World
from headrace.artifacts.files import read_json, write_json
from headrace.conversion.check import expected_values
from headrace.conversion.export import export
from headrace.errors import UserError
from headrace.evaluation.scorer import TransformerScorer, TransformersScorer, batches, score_rows


def test_log_probabilities_are_those_of_a_plain_softmax(world: World) -> None:
    scorer = TransformersScorer.load(world.hub)
    tokens = torch.from_numpy(world.rows[:3])
    with torch.no_grad():
        logits = scorer.model(tokens[:, :-1]).logits.double()
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    scores, likeliest = scorer.score(tokens)
    assert scores.dtype == torch.float32 and scores.shape == (3, LENGTH)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(likeliest, logits.argmax(-1) == tokens[:, 1:])


def test_rows_of_different_lengths_score_as_they_do_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.evaluation.scorer._LOGITS", 3 * LENGTH * world.config.vocab_size)
    scorer = TransformersScorer.load(world.hub)
    lengths = np.array([LENGTH, 5, 1, 30, LENGTH, 17, 2])
    tokens = world.rows[:7].copy()
    scores = score_rows(scorer, tokens, lengths, world.config.vocab_size)
    for row, length in enumerate(lengths.tolist()):
        alone = scorer.log_probabilities(torch.from_numpy(tokens[row : row + 1, : length + 1]))
        np.testing.assert_allclose(scores[row, :length], alone[0].numpy(), atol=2e-5)
        assert not scores[row, length:].any()
    groups = batches(lengths, world.config.vocab_size)
    assert len(groups) > 1 and sorted(np.concatenate(groups).tolist()) == list(range(7))


def test_our_model_and_transformers_agree_on_the_same_rounded_weights(world: World) -> None:
    tokens = torch.from_numpy(world.rows[6:12])
    tensors = load_file(world.checkpoint)
    rounded = {name: t if name.endswith("bias") else t.bfloat16().float() for name, t in tensors.items()}
    ours = TransformerScorer.of(rounded, world.checkpoint, world.config, "fp32")
    theirs = TransformersScorer.load(world.hub)
    torch.testing.assert_close(ours.log_probabilities(tokens), theirs.log_probabilities(tokens), atol=1e-5, rtol=0)
    unrounded = TransformerScorer.load(world.checkpoint, world.config, "fp32")
    assert (unrounded.log_probabilities(tokens) - theirs.log_probabilities(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [LIKE_V3, EDGES])
def test_an_fp8_export_is_run_with_the_values_of_its_codes_and_scales(
    world: World, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Cut blocks too, which transformers itself cannot dequantise."""
    config = replace(world.config, **changes)
    network = our_network(config)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", config, world.tokenizer, tmp_path / "hub", "fp8", 300_000)
    tokens = torch.from_numpy(world.rows[6:9])
    values = expected_values(tmp_path / "hub", tmp_path / "model.safetensors")
    ours = TransformerScorer.of(values, tmp_path, config, "fp32").log_probabilities(tokens)
    theirs = TransformersScorer.load(tmp_path / "hub")
    assert {parameter.dtype for parameter in theirs.model.parameters()} == {torch.float32}
    torch.testing.assert_close(theirs.log_probabilities(tokens), ours, atol=2e-5, rtol=0)
    unrounded = TransformerScorer(network).log_probabilities(tokens)
    assert (unrounded - ours).abs().max() > 1e-3
    assert theirs.model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_a_missing_tensor_is_not_filled_with_random_numbers(world: World, tmp_path: Path) -> None:
    for file in world.hub.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = read_json(tmp_path / "model.safetensors.index.json")
    name = "model.layers.0.self_attn.o_proj.weight"
    shard = tmp_path / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match=r"missing or unknown tensors, such as model\.layers\.0\.self_attn\.o_proj"):
        TransformersScorer.load(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(world: World) -> None:
    with pytest.raises(UserError) as caught:
        TransformerScorer.load(world.checkpoint, replace(world.config, num_hidden_layers=3), "fp32")
    assert str(world.checkpoint) in str(caught.value) and "\n" not in str(caught.value)
