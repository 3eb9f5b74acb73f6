"""The network cut into pipeline stages, and one microbatch's way through a stage.

The first stage has the embedding, the last one the final norm, the head, and the multi-token-prediction layer with an
embedding of its own (report, arXiv 2412.19437, section 2.2: shared with the first stage, so the two are one parameter
whose gradients are summed). Layers are split evenly, or as `parallel.layers` says; with more stages than layers some
have none. A rank builds only the stages it holds.

Where one rank holds both ends, the two embeddings share their memory and have a gradient each: so the order in which
their gradients are added does not depend on the schedule.
Shapes: B batch, T tokens, L tokens of a row (T + 1 + MTP depth), D model width, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from headrace.config.schema import ModelConfig
from headrace.fp8.gemms import wide
from headrace.fp8.linear import Linear
from headrace.fp8.numerics import Numerics
from headrace.model import rope
from headrace.model.dispatch import Dispatcher
from headrace.model.documents import Shifted
from headrace.model.experts import MoeFeedForward
from headrace.model.layer import Layer
from headrace.model.loss import IGNORED, cross_entropy, log_probabilities
from headrace.model.mtp import MtpLayer
from headrace.model.norm import RMSNorm
from headrace.model.router import Router
from headrace.model.transformer import Embedding, Transformer
from headrace.pipeline.overlap import Do, LayerPass, Piece, Steps, Surroundings, Weights


def split_layers(layers: int, stages: int, given: Sequence[int] | None) -> list[range]:
    """The layers of each stage: `given` numbers of them, or as even as can be, the earlier stages getting more.

    The last stage has the head, and with MTP one more layer, so that it is a later one that gets fewer is right.
    """
    counts = list(given) if given else [layers // stages + (stage < layers % stages) for stage in range(stages)]
    assert len(counts) == stages
    assert sum(counts) == layers
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


@dataclass(frozen=True)
class Stage:
    """The modules of one pipeline stage; a part that this stage lacks is None."""

    index: int
    config: ModelConfig
    embed: Embedding | None
    layers: dict[int, Layer]  # by their number in the model
    norm: RMSNorm | None
    head: Linear | None
    mtp: MtpLayer | None
    mtp_embed: Embedding | None
    names: dict[int, str] = field(repr=False)  # of parameters and buffers by their id, the Hub's

    def modules(self) -> Iterator[nn.Module]:
        """All that this stage is made of, each part once."""
        parts = (self.embed, *self.layers.values(), self.norm, self.head, self.mtp, self.mtp_embed)
        yield from dict.fromkeys(part for part in parts if part is not None)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names of the whole model."""
        for module in self.modules():
            for parameter in module.parameters():
                yield self.names[id(parameter)], parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers (router biases) by the names of the whole model."""
        for module in self.modules():
            for buffer in module.buffers():
                yield self.names[id(buffer)], buffer

    def routers(self) -> dict[int, Router]:
        """Routers by the number of their layer; the MTP layer's is the number of layers."""
        mtp = {self.config.num_hidden_layers: self.mtp} if self.mtp else {}
        layers: dict[int, Layer] = {**self.layers, **mtp}
        return {n: layer.mlp.gate for n, layer in layers.items() if isinstance(layer.mlp, MoeFeedForward)}


def build_stages(
    config: ModelConfig,
    numerics: Numerics,
    dispatcher: Dispatcher,
    split: Sequence[range],
    held: Sequence[int],
    device: torch.device,
) -> tuple[Transformer, dict[int, Stage]]:
    """The stages `held` by this rank on `device`, their values undefined, and the model they are parts of.

    Of the model itself only those parts have memory; it serves for its store and its dispatcher.
    """
    with torch.device("meta"):
        whole = Transformer(config, numerics, dispatcher=dispatcher).to(wide(numerics.dtype))
    last = len(split) - 1
    body = whole.model
    layers = [layer for layer in body.layers if isinstance(layer, Layer)]
    mtp = next((layer for layer in layers if isinstance(layer, MtpLayer)), None)
    for stage in held:
        for number in split[stage]:
            layers[number].to_empty(device=device)
        if stage == last:
            body.norm.to_empty(device=device)
            whole.lm_head.to_empty(device=device)
            if mtp:
                mtp.to_empty(device=device)
        if stage == 0 or (stage == last and mtp):
            body.embed_tokens.to_empty(device=device)
    names = {id(tensor): name for name, tensor in (*whole.named_parameters(), *whole.named_buffers())}
    stages = {}
    for index in held:
        ends = index == last
        second = body.embed_tokens
        if ends and mtp and 0 in held and last > 0:
            second = _tied(body.embed_tokens)
            names[id(second.weight)] = names[id(body.embed_tokens.weight)]
        stages[index] = Stage(
            index,
            config,
            body.embed_tokens if index == 0 else None,
            {number: layers[number] for number in split[index]},
            body.norm if ends else None,
            whole.lm_head if ends else None,
            mtp if ends else None,
            second if ends and mtp else None,
            names,
        )
    return whole, stages


def _tied(embedding: Embedding) -> Embedding:
    vocabulary, width = embedding.weight.shape
    with torch.device("meta"):
        twin = Embedding(vocabulary, width, embedding.dtype, embedding.store)
    twin.weight = nn.Parameter(embedding.weight.detach())
    return twin


@dataclass
class Results:
    """What this rank's stages measured: losses weighted by their microbatch's share, counts, scores if asked for."""

    losses: dict[str, Tensor] = field(default_factory=dict)  # sums by name: main, mtp, balance (with alpha)
    targets: dict[str, Tensor] = field(default_factory=dict)  # int64 [2] by name: places for targets, targets there
    counts: dict[int, Tensor] = field(default_factory=dict)  # int64 [E]: tokens per expert, by number of the layer
    log_probabilities: dict[int, Tensor] = field(default_factory=dict)  # [B, T] by microbatch

    def add(self, name: str, value: Tensor, share: float) -> None:
        """Add a loss."""
        value = value.detach() * share
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_of_tokens(self, name: str, value: Tensor, targets: Tensor, share: float) -> None:
        """Add a loss of tokens, some of whose targets may be absent; a microbatch that only fills up has no share."""
        self.add(name, value, share)
        if share:
            there = torch.stack([torch.ones_like(targets).sum(), (targets != IGNORED).sum()])
            self.targets[name] = self.targets[name] + there if name in self.targets else there

    def count(self, layer: int, counts_E: Tensor) -> None:
        """Add a layer's tokens per expert."""
        self.counts[layer] = self.counts[layer] + counts_E if layer in self.counts else counts_E


@dataclass(frozen=True)
class Microbatch:
    """Rows of tokens [B, L], how they weigh, and what is wanted of them."""

    tokens_BL: Tensor
    weights: Weights
    score: bool = False  # log p of every next token, in place of losses; rows are then of T + 1 tokens
    eos: int | None = None  # ends documents that do not see each other (`model.documents`); None: a row's all do

    def length(self, config: ModelConfig) -> int:
        """T."""
        ahead = 1 if self.score else 1 + config.num_nextn_predict_layers
        assert self.tokens_BL.shape[1] > ahead, "a row holds at least one token and its targets"
        return self.tokens_BL.shape[1] - ahead

    def shape(self, config: ModelConfig) -> torch.Size:
        """Of its hidden states: [B, T, D]."""
        return torch.Size((len(self.tokens_BL), self.length(config), config.hidden_size))


class StagePass:
    """One microbatch in one stage."""

    def __init__(self, stage: Stage, around: Surroundings, given: Microbatch, number: int) -> None:
        self._stage, self._around, self._given, self._number = stage, around, given, number
        self._weights, self._length = given.weights, given.length(stage.config)
        self._piece = Piece(around, given.weights.train)
        self._rows = Shifted(given.tokens_BL, self._length, given.eos)
        rotation = rope.rotation(stage.config, self._length, given.tokens_BL.device, self._rows.starts)
        self._layers = {n: LayerPass(layer, rotation, around, self._weights) for n, layer in stage.layers.items()}
        wanted = stage.mtp is not None and not given.score
        self._mtp = LayerPass(stage.mtp, rotation, around, self._weights) if wanted and stage.mtp else None

    def forward(self, hidden_BTD: Tensor | None, results: Results) -> Steps[Tensor | None]:
        """Hidden states [B, T, D] of the stage before (None on the first) to those for the next (None on the last)."""
        stage = self._stage
        if stage.embed is not None:
            hidden_BTD = self._embed(stage.embed)
        assert hidden_BTD is not None
        for layer in self._layers.values():
            hidden_BTD = yield from layer.forward(hidden_BTD)
        if stage.head is not None:
            yield from self._forward_head(hidden_BTD, results)
        passes = self._layers | ({stage.config.num_hidden_layers: self._mtp} if self._mtp else {})
        for number, layer in passes.items():
            if layer.counts_E is not None and self._weights.share:
                results.count(number, layer.counts_E)
            if layer.balance is not None:
                results.add("balance", layer.balance, self._weights.share)
        if stage.head is not None:
            return None
        return hidden_BTD if passes else hidden_BTD.clone()  # a receive buffer is not handed on

    def backward(self, dhidden_BTD: Tensor | None, do: Do) -> Steps[Tensor | None]:
        """The gradient of the output (None on the last stage) to that of the input (None on the first)."""
        if self._stage.head is not None:
            dhidden_BTD = yield from self._backward_head(do)
        for layer in reversed(self._layers.values()):
            assert dhidden_BTD is not None
            dhidden_BTD = yield from layer.backward(dhidden_BTD, do)
        assert dhidden_BTD is not None
        if self._stage.embed is None:
            return dhidden_BTD if self._layers else dhidden_BTD.clone()
        do(self._piece.backward("embedding'", [self._embedded], [dhidden_BTD]))
        return None

    def _embed(self, embed: Embedding) -> Tensor:
        hidden_BTD: Tensor = self._piece.forward("embedding", lambda: embed(self._rows.inputs()))
        if self._weights.train:
            self._embedded = get_gradient_edge(hidden_BTD)
        return hidden_BTD.detach()

    def _forward_head(self, hidden_BTD: Tensor, results: Results) -> Steps[None]:
        stage, targets = self._stage, self._rows.targets(1)
        norm, head = stage.norm, stage.head
        assert norm is not None
        assert head is not None
        if self._given.score:
            scores = log_probabilities(norm(hidden_BTD).flatten(0, 1), head, targets.flatten())
            results.log_probabilities[self._number] = scores.view(targets.shape)
            return
        self._hidden = self._piece.leaf(hidden_BTD)

        def main() -> tuple[Tensor, Tensor]:
            normed = norm(self._hidden)
            return normed, cross_entropy(normed.flatten(0, 1), head, targets.flatten())

        normed, loss = self._piece.forward("head", main)
        results.add_of_tokens("main", loss, targets, self._weights.share)
        self._head_out = [loss]
        if self._mtp is not None:
            yield from self._forward_mtp(normed, head, results)
        if self._weights.train:
            self._head_edges = [get_gradient_edge(output) for output in self._head_out]
        del self._head_out

    def _forward_mtp(self, normed_BTD: Tensor, head: Linear, results: Results) -> Steps[None]:
        mtp, embed = self._stage.mtp, self._stage.mtp_embed
        assert mtp is not None
        assert embed is not None
        assert self._mtp is not None
        joined = self._piece.forward("MTP join", lambda: mtp.join(embed(self._rows.inputs(1)), normed_BTD))
        self._head_out.append(joined)
        ahead = self._piece.leaf((yield from self._mtp.forward(joined.detach())))
        targets = self._rows.targets(2)

        def later() -> Tensor:
            return cross_entropy(mtp.shared_head.norm(ahead).flatten(0, 1), head, targets.flatten())

        loss = self._piece.forward("MTP head", later)
        results.add_of_tokens("mtp", loss, targets, self._weights.share)
        if self._weights.train:
            self._ahead, self._mtp_loss = ahead, get_gradient_edge(loss)

    def _backward_head(self, do: Do) -> Steps[Tensor]:
        share = torch.tensor(self._weights.share, dtype=wide(self._hidden.dtype), device=self._hidden.device)
        gradients = [share]
        if self._mtp is not None:
            do(self._piece.backward("MTP head'", [self._mtp_loss], [share * self._weights.mtp]))
            assert self._ahead.grad is not None
            gradients.append((yield from self._mtp.backward(self._ahead.grad, do)))
            del self._ahead, self._mtp_loss
        do(self._piece.backward("head'", self._head_edges, gradients))
        gradient = self._hidden.grad
        assert gradient is not None
        del self._hidden, self._head_edges
        return gradient
