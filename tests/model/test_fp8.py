"""The whole network in FP8: what recomputation may not change, what is kept, and what never runs in FP8."""

import dataclasses

import pytest
import torch

import transformers_peer as peers
from headrace.config.compose import load
from headrace.config.schema import RecomputeConfig
from headrace.fp8.emulated import ReferenceGemms
from headrace.fp8.gemms import PlainGemms
from headrace.fp8.linear import Weight
from headrace.fp8.numerics import Numerics, describe
from headrace.model import causal
from headrace.model.transformer import Transformer

CPU = torch.device("cpu")
PRECISION = load(["experiment=tiny", "precision=fp8"]).precision
ALL, NOTHING = RecomputeConfig(True, True, True), RecomputeConfig(False, False, False)


def model_with(numerics, seed=4):
    config = peers.random_config(seed)
    model = Transformer(config, numerics)
    peers_model = peers.random_model(config, seed)
    model.load_state_dict(peers_model.state_dict())
    return model


def step(model, seed=0, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, model.config.vocab_size, (3, tokens + 2), generator=generator)
    losses = model.losses(rows, 0.3, 1e-3)
    losses.total.backward()
    return losses.total.detach(), {name: p.grad for name, p in model.named_parameters()}


def numerics(compute="bf16", recompute=ALL, **changes):
    return Numerics(compute, dataclasses.replace(PRECISION.fp8, backend="reference", **changes), recompute)


@pytest.mark.parametrize("seed", [1, 4, 7])
@pytest.mark.parametrize("kept", [0, 1024])  # probabilities computed again, or kept
@pytest.mark.parametrize("fp8", [False, True])
def test_recomputation_changes_no_bit(monkeypatch, fp8, kept, seed):
    monkeypatch.setattr(causal, "_KEEP", kept)
    results = []
    for norms, up_projections in ((False, False), (True, False), (False, True), (True, True)):
        recompute = RecomputeConfig(norms, up_projections, swiglu=True)
        how = numerics(recompute=recompute) if fp8 else Numerics("bf16", None, recompute)
        results.append(step(model_with(how, seed)))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradient, results[0][1][name]) for name, gradient in gradients.items())


def test_keeping_swiglus_output_changes_no_bit_where_its_input_is_kept_whole():
    for how in (lambda r: Numerics("fp32", None, r), lambda r: numerics(recompute=r, swiglu_input_cache="bf16")):
        results = [step(model_with(how(dataclasses.replace(ALL, swiglu=again)))) for again in (False, True)]
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(g, results[1][1][name]) for name, g in results[0][1].items())


def test_deferred_weight_gradients_are_the_same():
    results = []
    for deferred in (False, True):
        model = model_with(numerics())
        if deferred:
            with model.store.deferred():
                step(model)
            model.store.flush()
        else:
            step(model)
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_fp8_is_near_fp32_and_not_equal_to_it():
    reference_loss, reference = step(model_with("fp32"))
    loss, gradients = step(model_with(numerics("fp32")))
    assert 0 < abs(loss - reference_loss) < 0.02 * reference_loss
    head, head_reference = gradients["lm_head.weight"], reference["lm_head.weight"]
    assert 0.001 < (head - head_reference).norm() / head_reference.norm() < 0.2


def test_weights_are_quantised_again_after_the_optimizer_whatever_was_computed_again():
    model = model_with(numerics())
    step(model)
    layer = model.model.layers[0].self_attn.kv_b_proj
    before = layer.operand()[0].clone()
    torch.optim.SGD(model.parameters(), lr=1.0, fused=True).step()  # raises no version counter
    step(model)
    assert not torch.equal(layer.operand()[0], before)
    assert torch.equal(layer.operand()[0], layer.gemms.weight(layer.weight.detach(), None)[0])


def test_only_projections_and_experts_are_in_fp8():
    model = model_with(numerics())
    fp8 = {name for name, layer in model.named_modules() if isinstance(layer, Weight) and not plain(layer)}
    assert {name.rsplit(".", 1)[1] for name in fp8} >= {"gate_proj", "up_proj", "down_proj", "o_proj", "kv_b_proj"}
    assert all(name.endswith("_proj") or name.endswith("_proj_with_mqa") for name in fp8)
    assert not any("eh_proj" in name or "lm_head" in name or name.endswith("mlp.gate") for name in fp8)
    if model.config.num_nextn_predict_layers:
        assert not plain(model_with(numerics(mtp_projection="fp8")).model.layers[-1].eh_proj)


def plain(layer):
    assert isinstance(layer.gemms, PlainGemms | ReferenceGemms)
    return isinstance(layer.gemms, PlainGemms)


def kept_bytes(model, tokens=300):
    """Bytes that autograd keeps for the backward pass, weights left out, every storage once."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    weights |= {t.untyped_storage().data_ptr() for m in model.modules() if isinstance(m, Weight) for t in m.operand()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, model.config.vocab_size, (2, tokens + 2), generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.losses(rows, 0.3, 1e-3)
    return sum(size for size, _ in storages.values())


def test_fp8_keeps_less_and_recomputation_keeps_less_still(monkeypatch):
    monkeypatch.setattr(causal, "_KEEP", 0)
    whole = kept_bytes(model_with(Numerics("bf16", None, NOTHING)))
    again = kept_bytes(model_with(Numerics("bf16", None, ALL)))
    fp8 = kept_bytes(model_with(numerics()))
    assert fp8 < again < whole


def test_the_table_says_what_runs_in_which_format():
    table = {row["what"].strip(): row["format"] for row in describe(PRECISION, CPU)}
    assert table["back end of the FP8 GEMMs"] == "reference"
    assert table["kept input of the projection after attention"] == "E5M6"
    assert table["embedding, output head, attention core"] == "BF16"
    plain_table = {row["what"]: row["format"] for row in describe(load(["experiment=tiny"]).precision, CPU)}
    assert plain_table["linear layers and experts: forward, input gradient, weight gradient"] == "BF16"
