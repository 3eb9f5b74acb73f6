"""The MTP layer against transformers' own, from the joined input to the loss of the token after next."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hub

import transformers_peer as peers


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_mtp_loss_and_gradients_equal_transformers(seed):
    config = dataclasses.replace(peers.random_config(seed), num_nextn_predict_layers=1)
    model = peers.random_model(config, seed)
    last = f"model.layers.{config.num_hidden_layers}."
    weights = peers.to_hub_names(model.state_dict())
    main = dataclasses.replace(config, num_nextn_predict_layers=0)
    peer = hub.DeepseekV3ForCausalLM(peers.hub_config(main))
    peer.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(last)})
    own = {name.removeprefix(last): tensor for name, tensor in weights.items() if name.startswith(last)}
    joining = ("enorm.", "hnorm.", "eh_proj.")
    renamed = {
        name.replace("shared_head.norm", "post_norm")
        if name.startswith((*joining, "shared_head."))
        else f"mtp_block.{name}": tensor
        for name, tensor in own.items()
    }
    theirs = MtpLayer(peer.config, hub.DeepseekV3DecoderLayer, hub.DeepseekV3RMSNorm, config.first_k_dense_replace)
    theirs.load_state_dict(renamed)

    tokens = torch.randint(config.vocab_size, (2, 17 + 2), generator=torch.Generator().manual_seed(seed))
    losses = model.losses(tokens, mtp_weight=0.3, balance_weight=0.0)
    losses.total.backward()

    hidden = peer.model(tokens[:, :17]).last_hidden_state
    positions = torch.arange(17)[None]
    causal = torch.full((17, 17), float("-inf")).triu(1)[None, None]
    ahead = theirs(
        peer.model.embed_tokens(tokens[:, 1:18]),
        hidden,
        position_embeddings=peer.model.rotary_emb(hidden, positions),
        attention_mask=causal,
        position_ids=positions,
        past_key_values=None,
    )
    main_loss = functional.cross_entropy(peer.lm_head(hidden).flatten(0, 1), tokens[:, 1:18].flatten())
    mtp_loss = functional.cross_entropy(peer.lm_head(ahead).flatten(0, 1), tokens[:, 2:19].flatten())
    (main_loss + 0.3 * mtp_loss).backward()
    assert losses.main.item() == pytest.approx(main_loss.item(), rel=1e-6)
    assert losses.mtp.item() == pytest.approx(mtp_loss.item(), rel=1e-6)

    ours = peers.gradients(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"):
        reference = dict(peer.named_parameters())[name].grad
        assert (ours[name] - reference).norm() <= 1e-5 * reference.norm(), name
    for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
        reference = dict(theirs.named_parameters())[name].grad
        assert (ours[last + name] - reference).norm() <= 1e-5 * reference.norm(), name
    reference = theirs.mtp_block.mlp.experts.down_proj.grad
    difference = ours[last + "mlp.experts.down_proj.weight"] - reference
    assert difference.norm() <= 1e-5 * reference.norm()
