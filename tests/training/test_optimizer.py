"""Who gets which optimizer and decay, and that the state is named, complete and refused when it does not fit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.parallel.assembly import fill
from headrace.parallel.shards import Piece, pieces_of
from headrace.training.optimizer import Optimizer, takes_decay, takes_muon

CONFIG = load([])
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_a_proj.weight": (6, 8),
    "model.layers.1.mlp.gate.weight": (4, 8),
    "model.layers.1.mlp.experts.gate_proj.weight": (4, 6, 8),
    "model.layers.1.mlp.shared_experts.gate_proj.weight": (6, 8),
    "model.layers.2.eh_proj.weight": (8, 16),
    "lm_head.weight": (20, 8),
}

STACK = "model.layers.1.mlp.experts.gate_proj.weight"


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES.items()}


def step(optimizer: Optimizer, tensors: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    optimizer.step(1e-2, 2e-2)


def build(tensors: dict[str, Tensor], name: str = "muon", **precision: Any) -> Optimizer:
    optimizer = replace(CONFIG.recipe.optimizer, name=name)
    return Optimizer(pieces_of(tensors.items()), optimizer, replace(CONFIG.precision, **precision))


def test_who_takes_what() -> None:
    tensors = parameters()
    assert [name for name, tensor in tensors.items() if takes_muon(name, tensor.shape)] == [
        "model.layers.0.self_attn.q_a_proj.weight",
        "model.layers.1.mlp.experts.gate_proj.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.2.eh_proj.weight",
    ]
    undecayed = {name for name, tensor in tensors.items() if not takes_decay(name, tensor.shape)}
    assert undecayed == {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"}


def test_zero_gradients_show_exactly_what_decays() -> None:
    for name in ("adamw", "muon"):
        tensors = parameters()
        before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        optimizer = build(tensors, name)
        for tensor in tensors.values():
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step(1e-2, 2e-2)
        for key, tensor in tensors.items():
            rate = 2e-2 if name == "muon" and takes_muon(key, tensor.shape) else 1e-2
            factor = 1 - rate * 0.1 if takes_decay(key, tensor.shape) else 1.0
            torch.testing.assert_close(tensor.detach(), before[key] * factor, rtol=1e-6, atol=0)


def state_of(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {piece.name: piece.tensor for piece in optimizer.moments()}


class InMemory:
    """Saved tensors that were never written."""

    def __init__(self, tensors: dict[str, Tensor], path: str) -> None:
        self._tensors, self.path = tensors, path

    def keys(self) -> list[str]:
        return list(self._tensors)

    def entry(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        target.view(-1).copy_(self._tensors[name].view(-1)[start : start + target.numel()])


def load_into(optimizer: Optimizer, saved: dict[str, torch.Tensor], where: str) -> None:
    fill(optimizer.moments(), set(state_of(optimizer)), InMemory(saved, where))


def test_state_is_named_after_parameters_and_shaped_like_them() -> None:
    tensors = parameters()
    state = state_of(build(tensors))
    for name, tensor in tensors.items():
        moments = {"momentum"} if takes_muon(name, tensor.shape) else {"exp_avg", "exp_avg_sq"}
        assert {key.rpartition("/")[2] for key in state if key.rpartition("/")[0] == name} == moments
        assert all(state[f"{name}/{moment}"].shape == tensor.shape for moment in moments)
    assert len(state_of(build(tensors, "adamw"))) == 2 * len(tensors)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_saved_and_loaded_state_goes_on_bitwise(name: str, moments: str) -> None:
    tensors = parameters()
    optimizer = build(tensors, name, optimizer_moments=moments)
    step(optimizer, tensors, 1)
    saved = {key: tensor.clone() for key, tensor in state_of(optimizer).items()}
    count = optimizer.state()
    resumed = {key: tensor.detach().clone().requires_grad_() for key, tensor in tensors.items()}
    second = build(resumed, name, optimizer_moments=moments)
    load_into(second, saved, "test")
    second.load_state(count)
    for seed in (2, 3):
        step(optimizer, tensors, seed)
        step(second, resumed, seed)
    assert all(torch.equal(tensors[key], resumed[key]) for key in tensors)
    assert second.state() == {"updates": 3}


def test_state_of_another_optimizer_is_refused_by_name() -> None:
    tensors = parameters()
    saved = state_of(build(tensors, "adamw"))
    with pytest.raises(UserError, match=r"state\.safetensors: .*q_a_proj\.weight/exp_avg"):
        load_into(build(tensors, "muon"), saved, "state.safetensors")
    saved = dict(state_of(build(tensors)))
    saved["lm_head.weight/exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"lm_head\.weight/exp_avg.*\[3, 3\].*\[20, 8\]"):
        load_into(build(tensors), saved, "state.safetensors")


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_pieces_are_classed_by_the_whole_shape_and_move_as_in_one_piece(moments: str) -> None:
    """A run of the embedding's elements has one dimension, like a norm; so does one of the head, which decays."""
    tensors = parameters()
    whole = build(tensors, optimizer_moments=moments)
    cut = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    pieces = pieces_of((key, t) for key, t in cut.items() if key not in ("lm_head.weight", STACK))
    head, stack = cut["lm_head.weight"].view(-1)[48:], cut[STACK][1:3]
    pieces += [Piece("lm_head.weight", head, (20, 8), 48), Piece(STACK, stack, (4, 6, 8), 48)]
    optimizer = Optimizer(
        pieces, replace(CONFIG.recipe.optimizer, name="muon"), replace(CONFIG.precision, optimizer_moments=moments)
    )
    for seed in (1, 2):
        step(whole, tensors, seed)
        for piece in pieces:
            generator = torch.Generator().manual_seed(seed)
            gradients = {key: torch.randn(t.shape, generator=generator) for key, t in tensors.items()}
            gradient = gradients[piece.name].view(-1)[piece.start : piece.start + piece.tensor.numel()]
            piece.tensor.grad = gradient.view(piece.tensor.shape).clone()
        optimizer.step(1e-2, 2e-2)
    for piece in pieces:
        expected = tensors[piece.name].detach().view(-1)[piece.start : piece.start + piece.tensor.numel()]
        torch.testing.assert_close(piece.tensor.view(-1), expected, rtol=0, atol=1e-7)
    moved = {piece.name: (piece.shape, piece.start) for piece in optimizer.moments()}
    assert moved["lm_head.weight/exp_avg_sq"] == ((20, 8), 48)
    assert moved[f"{STACK}/momentum"] == ((4, 6, 8), 48)
