"""Documents packed into a row that do not see each other: each is trained as if it had a row to itself."""

import dataclasses
import itertools

import pytest
import torch

import transformers_peer as peers
from headrace.config.schema import RecomputeConfig
from headrace.fp8.numerics import Numerics
from headrace.model.documents import Shifted, document_starts
from headrace.model.initialisation import initialise
from headrace.model.loss import IGNORED, inputs_of
from headrace.model.transformer import Transformer

EOS = 1
# Lengths of documents, the last cut by the row's end (None: the rest is padding). More than a block of 128 queries.
ROWS = {200: ([1, 2, 130, 40], [200], [3, 100, None]), 9: ([4, 2], [1, 1, 1, None], [9])}


def packed(length, vocabulary, seed=0):
    """int64 [3, length + 2]: rows of documents, some with true targets past their ends."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, vocabulary, (len(ROWS[length]), length + 2), generator=generator)
    for row, lengths in zip(rows, ROWS[length], strict=True):
        ends = torch.tensor([n for n in lengths if n]).cumsum(0)
        row[ends - 1] = EOS
        if lengths[-1] is None or ends[-1] == length:
            row[ends[-1] :] = IGNORED
        elif length == 9:
            row[length:] = torch.tensor([EOS, IGNORED])
    return rows


def pieces(row, length):
    """(begin, end) of each document, by walking along the row."""
    bounds = [0, *(place + 1 for place in range(length) if row[place] == EOS), length]
    return [(begin, end) for begin, end in itertools.pairwise(bounds) if begin < end]


def alone(row, begin, end, length):
    """[1, end - begin + 2]: the row that the loader gives for a document that has one to itself."""
    own = row[None, begin : end + 2].clone() if end == length else row[None, begin:end]
    own = torch.nn.functional.pad(own, (0, end - begin + 2 - own.shape[1]), value=IGNORED)
    return own if own[0, 0] != IGNORED else torch.cat([own.new_tensor([[EOS]]), own[:, 1:]], dim=1)  # padding


@pytest.mark.parametrize("length", ROWS)
def test_inputs_and_targets_are_those_of_each_document_in_a_row_of_its_own(length):
    rows = packed(length, 61)
    shifted, whole = Shifted(rows, length, EOS), Shifted(rows, length, None)
    assert whole.starts is None
    for ahead in (0, 1, 2):
        assert torch.equal(whole.targets(ahead), rows[:, ahead : length + ahead])
        assert torch.equal(whole.inputs(ahead), inputs_of(rows)[:, ahead : length + ahead])
    for number, row in enumerate(rows):
        for begin, end in pieces(row, length):
            own = Shifted(alone(row, begin, end, length), end - begin, None)
            assert set(shifted.starts[number, begin:end].tolist()) == {begin}
            for ahead in (1, 2):
                assert torch.equal(shifted.targets(ahead)[number, begin:end], own.targets(ahead)[0])
            for ahead in (0, 1):
                assert torch.equal(shifted.inputs(ahead)[number, begin:end], own.inputs(ahead)[0])


def test_a_document_begins_behind_the_end_of_another():
    rows = torch.tensor([[5, EOS, EOS, 6, 7, EOS], [5, 6, 7, EOS, IGNORED, IGNORED]])
    assert document_starts(rows, EOS).tolist() == [[0, 0, 2, 3, 3, 3], [0, 0, 0, 0, 4, 4]]


def model_of(config, seed, numerics):
    """In float64, with norms that are not 1 and biases that are not 0."""
    model = Transformer(config, numerics).double()
    initialise(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *(router.e_score_correction_bias for router in model.routers())):
        if tensor.dim() == 1:
            tensor.data.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model


ALL = RecomputeConfig(norms=True, up_projections=True, swiglu=True)
NONE = RecomputeConfig(norms=False, up_projections=False, swiglu=False)


# Odd seeds have YaRN; 2 and 3 project queries directly.
@pytest.mark.parametrize("length", ROWS)
@pytest.mark.parametrize(("seed", "recompute"), [(0, NONE), (1, ALL), (2, ALL), (3, NONE)])
def test_losses_and_gradients_are_those_of_the_documents_alone(seed, recompute, length):
    config = dataclasses.replace(peers.random_config(seed), num_nextn_predict_layers=1)
    model = model_of(config, seed, Numerics("fp64", None, recompute))
    rows = packed(length, config.vocab_size, seed)
    losses = model.losses(rows, 0.3, 0.0, EOS)
    losses.total.backward()
    ours = peers.gradients(model)
    model.zero_grad()

    main, mtp, counts = 0.0, 0.0, 0
    with model.store.accumulating():
        for row in rows:
            for begin, end in pieces(row, length):
                one = model.losses(alone(row, begin, end, length), 0.3, 0.0)
                share = (end - begin) / (len(rows) * length)
                (share * one.total).backward()
                main, mtp, counts = main + share * one.main, mtp + share * one.mtp, counts + one.counts
    assert losses.main.dtype == torch.float64
    assert losses.main.item() == pytest.approx(main.item(), rel=1e-10)
    assert losses.mtp.item() == pytest.approx(mtp.item(), rel=1e-10)
    assert torch.equal(losses.counts, counts)
    for name, gradient in peers.gradients(model).items():
        assert (gradient - ours[name]).norm() <= 1e-10 * gradient.norm(), name

    seeing = model.losses(rows, 0.3, 0.0)
    assert abs(seeing.main - losses.main) > 1e-4
    assert abs(seeing.mtp - losses.mtp) > 1e-4


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_row_of_one_document_is_trained_as_without_masks_to_the_bit(compute):
    config = dataclasses.replace(peers.random_config(1), num_nextn_predict_layers=1)
    model = peers.random_model(config, 1, compute)
    rows, found = torch.randint(2, config.vocab_size, (2, 150 + 2)), []
    for eos in (None, EOS):
        losses = model.losses(rows, 0.3, 1e-3, eos)
        losses.total.backward()
        found.append((losses, peers.gradients(model)))
        model.zero_grad()
    (one, gradients), (other, other_gradients) = found
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name
    assert [name for name in gradients if not torch.equal(gradients[name], other_gradients[name])] == []
