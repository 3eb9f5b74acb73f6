"""The whole network against transformers' DeepseekV3ForCausalLM."""

import dataclasses

import pytest
import torch
import transformers
from torch.nn import functional

import transformers_peer as peers
from headrace.config.compose import CONF, load
from headrace.model import rope
from headrace.model.loss import IGNORED
from headrace.model.transformer import Transformer

CONFIGS = range(20)
CPU = torch.device("cpu")


def _tokens(config, rows, length, seed=0):
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", CONFIGS)
def test_parity_of_logits_experts_and_gradients(seed):
    config = peers.random_config(seed)
    model = peers.random_model(config, seed)
    peer = peers.peer_of(model)
    length = (17, 33, 150)[seed % 3]  # 150 is more than one block of queries and no multiple of it
    tokens = _tokens(config, 2, length + 1, seed)
    chosen = []
    for layer in peer.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2].sort(dim=1).values))

    logits = model(tokens[:, :-1])
    theirs = peer(tokens[:, :-1]).logits
    assert (logits - theirs).abs().max() < 1e-5
    _, _, routings = model.hidden_states(tokens[:, :-1])
    assert len(routings) == len(chosen) == config.num_hidden_layers - config.first_k_dense_replace
    for routing, experts in zip(routings, chosen, strict=True):
        assert torch.equal(routing.experts_NK.sort(dim=1).values, experts)

    loss = model.losses(tokens, mtp_weight=0.0, balance_weight=0.0).total
    loss.backward()
    their_loss = functional.cross_entropy(theirs.flatten(0, 1), tokens[:, 1:].flatten())
    their_loss.backward()
    assert abs(loss.item() - their_loss.item()) < 1e-5
    their_gradients = peers.gradients(peer)
    for name, gradient in peers.to_hub_names(peers.gradients(model)).items():
        difference = (gradient - their_gradients[name]).norm()
        assert difference <= 1e-5 * their_gradients[name].norm(), name
    assert set(their_gradients) == set(peers.to_hub_names(peers.gradients(model)))


def _distances(config, seed):
    """Relative distances of BF16 logits and gradients from FP32: ours, and transformers' own `model.bfloat16()`."""
    reference = peers.random_model(config, seed)
    tokens = _tokens(config, 4, 130, seed)
    ours = peers.random_model(config, seed, "bf16")
    theirs = peers.peer_of(reference).bfloat16()
    targets = tokens[:, 1:].flatten()

    def run(model):
        if isinstance(model, type(reference)):
            model.losses(tokens, 0.0, 0.0).total.backward()
            return model(tokens[:, :-1]).detach(), peers.to_hub_names(peers.gradients(model))
        logits = model(tokens[:, :-1]).logits
        functional.cross_entropy(logits.float().flatten(0, 1), targets).backward()
        return logits.detach().float(), peers.gradients(model)

    exact_logits, exact = run(reference)

    def distance(result):
        logits, gradients = result
        squares = sum((gradients[name].float() - exact[name]).square().sum() for name in exact)
        norm = sum(gradient.square().sum() for gradient in exact.values())
        return (logits - exact_logits).norm() / exact_logits.norm(), (squares / norm).sqrt()

    return distance(run(ours)), distance(run(theirs))


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_bf16_is_no_further_from_fp32_than_transformers_own(seed):
    """Within a factor of 1.1: an expert swapped by rounding alone moves either distance a little."""
    ours, theirs = _distances(peers.random_config(seed), seed)
    for our_distance, their_distance in zip(ours, theirs, strict=True):
        assert our_distance <= 1.1 * their_distance
        assert our_distance < 0.2


def test_losses_add_up_and_counts_are_exact():
    config = dataclasses.replace(peers.random_config(4), num_nextn_predict_layers=1)
    model = peers.random_model(config, 4)
    tokens = _tokens(config, 3, 20 + 2)
    losses = model.losses(tokens, mtp_weight=0.3, balance_weight=0.01)
    assert losses.total.item() == pytest.approx((losses.main + 0.3 * losses.mtp + losses.balance).item(), rel=1e-6)
    logits = model(tokens[:, :20])
    assert logits.dtype == torch.float32
    assert losses.main.item() == pytest.approx(
        functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:21].flatten()).item(), rel=1e-5
    )
    by_token = model.token_log_probabilities(tokens[:, :21])
    expected = logits.log_softmax(-1).gather(2, tokens[:, 1:21, None])[..., 0]
    torch.testing.assert_close(by_token, expected, rtol=1e-5, atol=1e-5)

    layers = config.num_hidden_layers - config.first_k_dense_replace
    assert losses.counts.shape == (layers + 1, config.n_routed_experts)
    assert losses.counts.dtype == torch.int64
    assert losses.counts.sum(dim=1).tolist() == [60 * config.num_experts_per_tok] * (layers + 1)
    _, _, routings = model.hidden_states(tokens[:, :20])
    for counts, routing in zip(losses.counts, routings, strict=False):
        assert counts.tolist() == [(routing.experts_NK == e).sum().item() for e in range(config.n_routed_experts)]
    assert model.losses(tokens, 0.3, 0.0).balance.item() == 0
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    model.update_router_bias(losses.counts, 0.01)
    for router, bias, counts in zip(model.routers(), before, losses.counts, strict=True):
        expected_bias = bias + 0.01 * (counts.double().mean() - counts).sign()
        torch.testing.assert_close(router.e_score_correction_bias, expected_bias.float())


def test_short_rows_are_trained_as_what_they_hold_alone():
    """Losses and gradients of rows that end early are those of the same rows cut there, weighed by their length."""
    config = dataclasses.replace(peers.random_config(4), num_nextn_predict_layers=1)
    model, lengths = peers.random_model(config, 4), (20, 13, 2)
    tokens = _tokens(config, 3, 20 + 2)
    for row, length in zip(tokens, lengths, strict=True):
        row[length + (2 if length == 20 else 0) :] = IGNORED
    losses = model.losses(tokens, mtp_weight=0.3, balance_weight=0.0)
    losses.total.backward()
    ours = peers.gradients(model)
    model.zero_grad()

    main, mtp = 0.0, 0.0
    with model.store.accumulating():
        for row, length in zip(tokens, lengths, strict=True):
            held = row[row != IGNORED][None]
            hidden, _, _ = model.hidden_states(held[:, : min(length, 20)])
            logits = model.lm_head(hidden)[0]
            targets = held[0, 1 : length + 1]
            one = functional.cross_entropy(logits[: len(targets)], targets, reduction="sum") / 60
            ahead, _ = model._mtp_states(
                held[:, 1 : length + 1], hidden[:, : len(targets)], rope.rotation(config, len(targets), CPU)
            )
            after = held[0, 2 : length + 2]
            two = functional.cross_entropy(model.lm_head(ahead)[0, : len(after)], after, reduction="sum") / 60
            (one + 0.3 * two).backward()
            main, mtp = main + one.item(), mtp + two.item()
    assert losses.main.item() == pytest.approx(main, rel=1e-5)
    assert losses.mtp.item() == pytest.approx(mtp, rel=1e-5)
    for name, gradient in peers.gradients(model).items():
        assert (gradient - ours[name]).norm() <= 1e-5 * ours[name].norm() + 1e-9, name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_microbatches_accumulate_to_the_batch(compute):
    config = dataclasses.replace(peers.random_config(4), num_nextn_predict_layers=1)
    model = peers.random_model(config, 4, compute)
    tokens = _tokens(config, 4, 30)
    model.losses(tokens, 0.3, 0.01).total.backward()
    whole = peers.gradients(model)
    model.zero_grad()
    with model.store.accumulating():
        for part in tokens.split(2):
            (model.losses(part, 0.3, 0.01).total / 2).backward()
    for name, gradient in peers.gradients(model).items():
        tolerance = 1e-5 if compute == "fp32" else 0.03
        assert (gradient - whole[name]).norm() <= tolerance * whole[name].norm() + 1e-9, name


def test_deferred_weight_gradients_are_the_same():
    config = dataclasses.replace(peers.random_config(4), num_nextn_predict_layers=1)
    model = peers.random_model(config, 4)
    tokens = _tokens(config, 2, 30)
    model.losses(tokens, 0.3, 0.01).total.backward()
    now = peers.gradients(model)
    model.zero_grad()
    with model.store.deferred():
        model.losses(tokens, 0.3, 0.01).total.backward()
    assert model.lm_head.weight.grad is None
    model.store.flush()
    for name, gradient in peers.gradients(model).items():
        assert torch.equal(gradient, now[name]), name


def test_training_learns_a_fixed_sequence_in_bf16_with_the_fused_optimizer():
    """The loss of a memorised sequence goes to almost nothing: weights seen by the forward pass are the optimizer's."""
    config = dataclasses.replace(peers.random_config(0), num_nextn_predict_layers=1)
    model = peers.random_model(config, 0, "bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, weight_decay=0.0)
    tokens = _tokens(config, 1, 24)
    for _ in range(60):
        losses = model.losses(tokens, 0.3, 1e-4)
        losses.total.backward()
        optimizer.step()
        model.store.recycle(model.parameters())
    assert losses.main.item() < 0.1
    assert losses.mtp.item() < 0.3


@pytest.mark.parametrize("name", ["v3_671b", "v3_671b_128k"])
def test_parameter_counts_of_the_published_model(name):
    """671B exactly (Hub checkpoint), 11.61B in the MTP layer."""
    config = load([f"model={name}"]).model
    with torch.device("meta"):
        model = Transformer(config, "bf16")
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    mtp = sum(size for key, size in sizes.items() if key.startswith("model.layers.61."))
    assert sum(sizes.values()) - mtp == 671_026_404_352
    biases = {key: b.numel() for key, b in model.named_buffers() if key.endswith("e_score_correction_bias")}
    assert sum(size for key, size in biases.items() if not key.startswith("model.layers.61.")) == 14_848
    assert len(biases) == len(dict(model.named_buffers())) == 59
    assert mtp + biases["model.layers.61.mlp.gate.e_score_correction_bias"] == 11_610_068_224
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_every_model_choice_composes_and_its_names_are_the_hubs():
    for path in sorted((CONF / "model").glob("*.yaml")):
        config = load([f"model={path.stem}"]).model
        with torch.device("meta"):
            names = set(Transformer(config, "bf16").state_dict())
            peer = transformers.DeepseekV3ForCausalLM(peers.hub_config(config))
        prefix = f"model.layers.{config.num_hidden_layers}."
        stacked = torch.empty(1, 1, 1, device="meta")
        flat = torch.empty(1, device="meta")
        main = {n: stacked if ".mlp.experts." in n else flat for n in names if not n.startswith(prefix)}
        assert set(peers.to_hub_names(main)) == set(peer.state_dict())
