"""How the model is cut: layers, names, both ends of the pipeline, stages without layers, scores."""

import pytest
import torch

from headrace.config.schema import RecomputeConfig
from headrace.fp8.numerics import Numerics
from headrace.model.loss import IGNORED, inputs_of
from headrace.model.transformer import Transformer
from headrace.pipeline.overlap import Weights, run
from headrace.pipeline.stages import Microbatch, Results, StagePass, split_layers
from pipeline_runs import (
    ALPHA,
    EOS,
    MTP,
    configuration,
    distance,
    documents,
    engine,
    gradients,
    present,
    reference,
    reference_step,
    rows,
    stage_gradients,
    stages_here,
)


@pytest.mark.parametrize(
    ("layers", "stages", "given", "counts"),
    [
        (4, 2, None, [2, 2]),
        (5, 3, None, [2, 2, 1]),
        (2, 4, None, [1, 1, 0, 0]),
        (61, 16, None, [4] * 13 + [3] * 3),
        (4, 3, (0, 4, 0), [0, 4, 0]),
    ],
)
def test_layers_are_split_in_order(layers, stages, given, counts):
    split = split_layers(layers, stages, given)
    assert [len(part) for part in split] == counts
    assert [layer for part in split for layer in part] == list(range(layers))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_stages_together_hold_every_name_of_the_model_once_and_the_embedding_at_both_ends(count):
    config = configuration()
    stages, _ = stages_here(config, Numerics("fp32"), count)
    with torch.device("meta"):
        whole = Transformer(config.model, Numerics("fp32"))
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    twice = ["model.embed_tokens.weight"] if count > 1 else []
    assert sorted(names) == sorted([*dict(whole.named_parameters()), *twice])
    buffers = [name for stage in stages for name, _ in stage.named_buffers()]
    assert sorted(buffers) == sorted(dict(whole.named_buffers()))
    assert sorted(number for stage in stages for number in stage.routers()) == [1, 2, 3, 4]
    assert not any(parameter.is_meta for stage in stages for _, parameter in stage.named_parameters())


def test_both_embeddings_of_a_rank_share_their_memory_and_not_their_gradient():
    (first, last), _ = stages_here(configuration(), Numerics("fp32"), 2)
    assert last.embed is None
    assert last.mtp_embed.weight is not first.embed.weight
    assert last.mtp_embed.weight.data_ptr() == first.embed.weight.data_ptr()


def test_a_stage_without_layers_hands_on_a_copy_so_that_its_buffer_can_be_used_again():
    stages, around = stages_here(configuration(), Numerics("fp32"), 7)
    given = Microbatch(rows(configuration(), count=1), Weights(1, MTP, ALPHA, train=True))
    hidden, results = torch.randn(given.shape(stages[5].config)), Results()
    passing = StagePass(stages[5], around, given, 0)
    for out in (run(passing.forward(hidden, results)), run(passing.backward(hidden, around.store.do))):
        assert torch.equal(out, hidden)
        assert out.data_ptr() != hidden.data_ptr()
    assert results == Results()


def test_scores_are_those_of_the_whole_model_and_need_no_token_beyond_their_targets():
    config = configuration()
    stages, around = stages_here(config, Numerics("fp32"), 3)
    tokens, results, hidden = rows(config, count=2)[:, :-1], Results(), None
    given = Microbatch(tokens, Weights(1, 0, 0, train=False), score=True)
    for stage in stages:
        hidden = run(StagePass(stage, around, given, 5).forward(hidden, results))
    expected = reference(config, Numerics("fp32")).token_log_probabilities(tokens)
    torch.testing.assert_close(results.log_probabilities[5], expected)
    assert not results.losses


def test_rows_that_end_early_give_the_gradients_of_the_whole_model():
    config, batch = configuration(), rows(configuration())
    for row, length in zip(batch, (18, 17, 16, 11, 1, 18, 5, 16), strict=True):
        row[length:] = IGNORED
    found = {name: sum(parts) for name, parts in stage_gradients(config, Numerics("fp64"), batch, 1 / 8).items()}
    model = reference(config, Numerics("fp64"))
    reference_step(model, batch)
    assert distance(found, {name: parameter.grad for name, parameter in model.named_parameters()}) < 1e-12


def test_losses_are_means_over_the_targets_that_are_there():
    config, batch = configuration(), rows(configuration())
    for row, length in zip(batch, (18, 17, 16, 11, 1, 18, 5, 16), strict=True):
        row[length:] = IGNORED
    model, numerics = reference(config, Numerics("fp64")), Numerics("fp64")
    sums, _ = reference_step(model, batch)
    found = engine(config, numerics).step(batch, MTP, ALPHA, "step 1")
    there = [(batch[:, ahead : ahead + 16] != IGNORED) for ahead in (1, 2)]
    scores = model.token_log_probabilities(inputs_of(batch)[:, :17])
    torch.testing.assert_close(found.main, -scores[there[0]].mean(), check_dtype=False)
    torch.testing.assert_close(found.mtp.item(), sums[1] * there[1].numel() / there[1].sum().item())
    measured = engine(config, numerics).measure(batch, "the validation")
    torch.testing.assert_close(measured.main, found.main)
    torch.testing.assert_close(measured.mtp, found.mtp)


@pytest.mark.parametrize("recompute", [False, True])
def test_documents_that_do_not_see_each_other_give_the_gradients_of_the_whole_model(recompute):
    config, batch = configuration(), documents(configuration())
    numerics = Numerics("fp64", None, RecomputeConfig(recompute, recompute, recompute))
    running, model = engine(config, numerics, eos=EOS), reference(config, numerics)
    theirs, counts = reference_step(model, batch, eos=EOS)
    losses = running.step(batch, MTP, ALPHA, "step 1")
    assert torch.equal(losses.counts, counts)
    assert distance(gradients(running), {name: parameter.grad for name, parameter in model.named_parameters()}) < 1e-12
    assert losses.main.item() == pytest.approx(theirs[0] / present(batch, 1), rel=1e-12)
    assert losses.mtp.item() == pytest.approx(theirs[1] / present(batch, 2), rel=1e-12)


def test_documents_are_apart_in_validation_and_rows_are_scored_as_one_text():
    config, batch, numerics = configuration(), documents(configuration()), Numerics("fp64")
    apart, together = engine(config, numerics, eos=EOS), engine(config, numerics)
    trained, measured = apart.step(batch, MTP, ALPHA, "step 1"), apart.measure(batch, "the validation")
    torch.testing.assert_close(measured.main, trained.main)
    torch.testing.assert_close(measured.mtp, trained.mtp)
    assert abs(measured.main - together.measure(batch, "the validation").main) > 1e-4
    rows = inputs_of(batch)[:, :17]
    assert torch.equal(*(running.token_log_probabilities(rows, "scores") for running in (apart, together)))
