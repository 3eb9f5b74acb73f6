"""A stand-in for model and data: small enough to be obvious, with every part that the trainer touches.

The model is an embedding, experts chosen by a biased score, and a head. A token 0 in a row makes its loss infinite. The
data repeats a short cycle of tokens, so a model that learns gets far below the uniform loss at once.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.checkpoint.reader import newest_valid
from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.parallel.mesh import Groups, Mesh
from headrace.parallel.reduction import GradientReduction, Held
from headrace.parallel.shards import Piece, pieces_of
from headrace.pipeline.engine import Losses, Unwatched
from headrace.pipeline.record import Record
from headrace.training.optimizer import stays_whole
from headrace.training.rows import Rows
from headrace.training.trainer import Place, Trainer, Watchers

VOCABULARY, WIDTH, EXPERTS, LENGTH = 16, 8, 4, 8


def toy_config(steps: int = 12, **recipe: object) -> Config:
    """`experiment=tiny`, cut down to the toy: 4 sequences of 8 tokens a step."""
    config = load(["experiment=tiny", "precision=fp32", "tracking.log_every=1"])
    plain = {"batch_ramp": None, "extensions": (), "ema_decay": None}
    size = {"tokens": steps * 4 * LENGTH, "sequence_length": LENGTH, "batch_sequences": 4}
    cut = replace(config.recipe, **plain | size | recipe)  # type: ignore[arg-type]
    model = replace(config.model, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    train = replace(config.train, validate_every=5, validation_rows=3)
    checkpoint = replace(config.checkpoint, interval=4)
    return replace(config, recipe=cut, model=model, train=train, checkpoint=checkpoint)


class ToyModel(nn.Module):
    """Names and shapes as in a real model: embedding, stacked experts, router with bias, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.store = WeightGradientStore()
        self.bias_updates: list[tuple[list[list[int]], float]] = []
        for name, shape in {
            "embed_tokens": (VOCABULARY, WIDTH),
            "gate": (EXPERTS, WIDTH),
            "experts": (EXPERTS, WIDTH, WIDTH),
            "lm_head": (VOCABULARY, WIDTH),
            "norm": (WIDTH,),
        }.items():
            module = nn.Module()
            module.weight = nn.Parameter(torch.empty(*shape))
            self.add_module(name, module)
        self.register_buffer("e_score_correction_bias", torch.empty(EXPERTS))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            drawn = torch.ones(WIDTH) if "norm" in name else torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(drawn)
        self.e_score_correction_bias.zero_()

    def log_probabilities(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, V] and the expert of each token [B, T]."""
        x = self.embed_tokens.weight[inputs]
        scores = (x @ self.gate.weight.T).sigmoid()
        chosen = (scores + self.e_score_correction_bias).argmax(-1)
        mixed = torch.einsum("btd,btod->bto", x, self.experts.weight[chosen])
        x = functional.rms_norm(x + mixed * scores.gather(-1, chosen[..., None]), (WIDTH,), self.norm.weight)
        return (x @ self.lm_head.weight.T).log_softmax(-1), chosen

    def losses(self, tokens_BL: Tensor) -> Losses:
        logs, chosen = self.log_probabilities(tokens_BL[:, :-1])
        main = -logs.gather(-1, tokens_BL[:, 1:, None]).mean()
        main = main * (float("inf") if (tokens_BL == 0).any() else 1.0)
        zero = main.new_zeros(())
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)[None]
        return Losses(main, zero, zero, counts)

    @torch.no_grad()
    def token_log_probabilities(self, tokens_BL: Tensor) -> Tensor:
        logs, _ = self.log_probabilities(tokens_BL[:, :-1])
        return logs.gather(-1, tokens_BL[:, 1:, None])[..., 0]

    @torch.no_grad()
    def update_router_bias(self, counts_LE: Tensor, speed: float) -> None:
        self.bias_updates.append((counts_LE.tolist(), speed))
        mean = counts_LE[0].float().mean()
        self.e_score_correction_bias += speed * (mean - counts_LE[0]).sign()


class ToyLearner:
    """`headrace.training.learner.Learner` around the toy, in one process."""

    def __init__(self, model: ToyModel, config: Config) -> None:
        self.model, self.device, self.watch = model, torch.device("cpu"), Unwatched()
        self.dispatch = "local"
        self.mesh, self.record = Mesh.of(config.parallel, 0), Record()
        self._microbatch = config.parallel.microbatch
        held = [Held(name, parameter, 0, (0,)) for name, parameter in model.named_parameters()]
        groups = Groups(self.mesh, timedelta(seconds=60))
        whole = partial(stays_whole, config.recipe.optimizer)
        self.reduction = GradientReduction(held, self.mesh, groups, model.store, whole, self.device)

    def step(self, rows: Tensor, mtp_weight: float, balance_weight: float, label: str) -> Losses:
        parts = torch.split(rows, self._microbatch or len(rows))
        losses = [self.model.losses(part) for part in parts]
        self.record.action("0F0", 0.0)
        self.record.note("output", losses)
        (torch.stack([each.main for each in losses]).mean()).backward()
        self.reduction.finish()
        return self._mean(losses)

    @torch.no_grad()
    def measure(self, rows: Tensor, label: str) -> Losses:
        return self._mean([self.model.losses(rows)])

    def token_log_probabilities(self, rows: Tensor, label: str) -> Tensor:
        return self.model.token_log_probabilities(rows)

    def update_router_bias(self, counts: Tensor, speed: float) -> None:
        self.model.update_router_bias(counts, speed)

    def owned(self) -> list[Piece]:
        return [*self.reduction.pieces, *pieces_of(self.model.named_buffers())]

    def everything(self) -> list[Piece]:
        return self.owned()

    def recycle(self) -> None:
        self.model.store.recycle(self.model.parameters())

    def replicas(self) -> list[list[Piece]]:
        return []

    def agreed_all(self, value: object) -> list[object]:
        return [json.loads(json.dumps(value))]

    def roles(self) -> list[tuple[int, ...]]:
        return [(0,)]

    def initialise(self) -> None:
        self.model.initialise()

    def begin_timeline(self) -> None:
        pass

    def timeline(self) -> dict[str, object]:
        return {}

    @staticmethod
    def _mean(losses: list[Losses]) -> Losses:
        main = torch.stack([each.main.detach() for each in losses]).mean()
        return Losses(main, main * 0, main * 0, sum(each.counts for each in losses))


def toy_batch(first: int, sequences: int) -> Tensor:
    """Rows of the cycle 1 2 3 .. 15, each begun at another place; a pure function of the position."""
    starts = torch.arange(first, first + sequences)[:, None] * 7
    return (starts + torch.arange(LENGTH + 1)) % (VOCABULARY - 1) + 1


def toy_rows(batch: object = toy_batch) -> Rows:
    return Rows(batch, 1000, toy_batch(5000, 3), toy_batch(6000, 2))  # type: ignore[arg-type]


@dataclass
class Recorder:
    """Tracker, deadline, progress and ledger in one; stops the run after `stop_after` steps."""

    stop_after: int | None = None
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    closed: bool = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append((step, dict(metrics)))

    def event(self, name: str, facts: Mapping[str, object]) -> None:
        self.events.append((name, json.loads(json.dumps(dict(facts), allow_nan=False))))

    def of(self, name: str) -> list[dict[str, object]]:
        return [facts for event, facts in self.events if event == name]

    def reason(self) -> str | None:
        return "told to" if self.stop_after is not None and len(self.shown) >= self.stop_after else None

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        self.shown.append(step)

    def close(self) -> None:
        self.closed = True


def toy_trainer(
    config: Config,
    folder: Path,
    recorder: Recorder | None = None,
    model: ToyModel | None = None,
    rows: Rows | None = None,
    source: Path | None = None,
    fingerprint: str = "0123456789ab",
    **place: object,
) -> Trainer:
    """A trainer of the toy with checkpoints in `folder`."""
    recorder = recorder or Recorder()
    place = Place(folder, fingerprint, 1e4, source, same_rows=True, **place)  # type: ignore[arg-type]
    watchers = Watchers(recorder, logging.getLogger("headrace.test"), recorder, recorder, recorder.event)
    return Trainer(config, ToyLearner(model or ToyModel(), config), rows or toy_rows(), place, watchers)


TIMED = {"tokens_per_second", "mfu"}


def frozen(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor, by kind and name, and everything else that the newest checkpoint holds, measured times aside."""
    found = newest_valid(folder)
    assert found is not None
    state = dict(found.state)
    state["counters"] = {k: v for k, v in state["counters"].items() if k != "seconds"}
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in state["history"]["rows"]]
    state["history"] = {**state["history"], "rows": rows}
    return {f"{kind} {name}": found.get(kind, name) for kind in found.kinds for name in found.names(kind)}, state


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Bitwise."""
    (tensors, state), (other_tensors, other_state) = frozen(ours), frozen(theirs)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    assert state == other_state


def poisoned(positions: Container[int]) -> Rows:
    """The toy's data with a token 0, whose loss is infinite, in the rows at these positions."""

    def batch(first: int, sequences: int) -> Tensor:
        rows = toy_batch(first, sequences)
        for index in range(sequences):
            if first + index in positions:
                rows[index, 3] = 0
        return rows

    return toy_rows(batch)


class KillAt(Recorder):
    """Kills its own process with SIGKILL at a step, before that step's checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.kill_step = step

    def update(self, step: int, steps: int, tokens: int, metrics: Mapping[str, float]) -> None:
        if step == self.kill_step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, kill_step: str, asynchronous: str, *words: str) -> None:
    """Train the toy in this process and be killed at a step; 0 runs to the end. `words` are names of `VARIANTS`."""
    config = toy_config()
    for word in words:
        config = VARIANTS[word](config)
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=asynchronous == "asynchronous"))
    outcome = toy_trainer(config, Path(folder), KillAt(int(kill_step))).run()
    assert outcome.finished


VARIANTS: dict[str, Callable[[Config], Config]] = {
    "ema": lambda config: replace(config, recipe=replace(config.recipe, ema_decay=0.9)),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
