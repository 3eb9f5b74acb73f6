"""A small V3 model trained through the engine, and the same without it, for tests of the pipeline."""

from dataclasses import replace
from functools import cache

import torch

from headrace.config.compose import load
from headrace.fp8.numerics import Numerics
from headrace.model.dispatch import LocalDispatcher
from headrace.model.initialisation import initialise, initialise_parameters
from headrace.model.loss import IGNORED
from headrace.model.transformer import Transformer
from headrace.parallel.channel import InlineChannel
from headrace.parallel.mesh import Mesh
from headrace.parallel.shards import pieces_of
from headrace.pipeline.engine import Engine
from headrace.pipeline.overlap import Surroundings, Weights
from headrace.pipeline.overlap import run as run_steps
from headrace.pipeline.stages import Microbatch, Results, StagePass, build_stages, split_layers
from headrace.training.optimizer import Optimizer, stays_whole
from ranks import gather

MTP, ALPHA, BIAS_SPEED = 0.3, 0.01, 1e-3
SCHEDULES = ["1f1b", "zb1p", "zb_v", "dualpipe", "dualpipe_v"]
CPU = torch.device("cpu")


def configuration(precision="fp32", model=(), recipe=(), **parallel):
    """A tree of experiment=tiny: MoE layers, the first one dense, and MTP; 8 rows a step, one in a microbatch."""
    config = _tiny(precision)
    small = {
        "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
        "num_experts_per_tok": 3, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    return replace(
        config,
        model=replace(config.model, **(small | dict(model))),
        recipe=replace(config.recipe, **({"batch_sequences": 8, "sequence_length": 16} | dict(recipe))),
        parallel=replace(config.parallel, **({"microbatch": 1} | parallel)),
    )


@cache
def _tiny(precision):
    return load(["experiment=tiny", f"precision={precision}"])


def layout(schedule, pipeline=2, expert=1, node_size=1):
    """Settings of `parallel`: an expert group is all data ranks."""
    return {
        "schedule": schedule, "pipeline": pipeline, "expert": expert, "data": expert, "node_size": node_size,
    }  # fmt: skip


def rows(config, step=0, count=8):
    """Random tokens [count, L]: as long as training's are."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, config.model.vocab_size, (count, _length(config)), generator=generator)


EOS = 1


def documents(config):
    """Rows [8, L] of a few documents each; two rows end early."""
    batch = rows(config).clamp(min=EOS + 1)
    generator = torch.Generator().manual_seed(7)
    batch[torch.rand(batch.shape, generator=generator) < 0.15] = EOS
    for row, end in zip(batch, (16, 11, 16, 5), strict=False):
        row[end - 1], row[end:] = EOS, IGNORED
    return batch


def present(batch, ahead):
    """The share of places [8, 16] whose target is a token of their own document, counted one by one."""
    found = [
        IGNORED not in (target := row[place + 1 : place + ahead + 1]) and EOS not in [row[place], *target[:-1]]
        for row in batch.tolist()
        for place in range(16)
    ]
    return sum(found) / len(found)


def _length(config):
    return config.recipe.sequence_length + 1 + config.model.num_nextn_predict_layers


def lessons(config, step, count=8):
    """Rows that can be learned: tokens go up in steps of 1 to 3, modulo 61; three in ten are any token at all."""
    generator = torch.Generator().manual_seed(500 + step)
    first, stride = (torch.randint(low, high, (count, 1), generator=generator) for low, high in ((0, 61), (1, 4)))
    tokens = (first + stride * torch.arange(_length(config))) % 61
    noise = torch.randint(0, config.model.vocab_size, tokens.shape, generator=generator)
    return torch.where(torch.rand(tokens.shape, generator=generator) < 0.3, noise, tokens)


def update(optimizer, peak, step):
    """Update `step` of a warm-up over 50, as in the demo's recipe."""
    share = min(1, (step + 1) / 50)
    optimizer.step(share * peak, share * 0.02)


def numerics_of(name, config):
    return Numerics.resolve(config.precision, CPU) if name == "fp8" else Numerics(name)


def engine(config, numerics, rank=0, **arguments):
    mesh = Mesh.of(config.parallel, rank)
    whole = lambda name, shape: stays_whole(config.recipe.optimizer, name, shape)  # noqa: E731
    return Engine(config, numerics, mesh, CPU, whole, **arguments)


def local(engine, batch):
    """This data rank's rows."""
    share = len(batch) // engine.mesh.data
    return batch[engine.mesh.data_rank * share :][:share]


def gradients(engine):
    """Whole gradients by name, on rank 0."""
    pieces = [piece.of(piece.name, piece.tensor.grad) for piece in engine.reduction.pieces]
    return gather(pieces, engine.mesh)


def figures(losses):
    return [losses.main.item(), losses.mtp.item(), losses.balance.item()]


def train(engine, config, steps):
    """Yields losses (main, MTP, balance) and counts of every step, trained as the trainer does it."""
    optimizer = Optimizer(engine.reduction.pieces, config.recipe.optimizer, config.precision)
    for step in range(steps):
        losses = engine.step(local(engine, lessons(config, step)), MTP, ALPHA, f"step {step + 1}")
        engine.reduction.clip(config.recipe.optimizer.gradient_clip, engine.reduction.norm())
        update(optimizer, config.recipe.learning_rate.peak, step)
        engine.reduction.share()
        engine.update_router_bias(losses.counts, BIAS_SPEED)
        engine.recycle()
        yield figures(losses), losses.counts


def reference(config, numerics):
    model = Transformer(config.model, numerics).to(torch.float64 if numerics.dtype == torch.float64 else torch.float32)
    initialise(model, config.model, config.seed.init)
    return model


def reference_step(model, batch, size=1, eos=None):
    """Losses (main, MTP, balance) and counts of one step by plain autograd; gradients in `.grad`."""
    parts = torch.split(batch, size)
    sums, counts = torch.zeros(3, dtype=torch.float64), 0
    with model.store.accumulating():
        for part in parts:
            losses = model.losses(part, MTP, ALPHA, eos)
            (losses.total / len(parts)).backward()
            sums += torch.stack([losses.main, losses.mtp, losses.balance]).detach().double() / len(parts)
            counts = counts + losses.counts
    return sums.tolist(), counts


def reference_train(model, config, steps):
    """Yields what `train` does, in one process without engine, reduction or shards."""
    optimizer = Optimizer(pieces_of(model.named_parameters()), config.recipe.optimizer, config.precision)
    for step in range(steps):
        losses, counts = reference_step(model, lessons(config, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.recipe.optimizer.gradient_clip)
        update(optimizer, config.recipe.learning_rate.peak, step)
        model.update_router_bias(counts, BIAS_SPEED)
        model.zero_grad()
        yield losses, counts


def stages_here(config, numerics, count, **surroundings):
    """The model in `count` stages, all in this process without engine or reduction, and what their passes need."""
    split = split_layers(config.model.num_hidden_layers, count, None)
    model, stages = build_stages(config.model, numerics, LocalDispatcher(numerics.linear), split, range(count), CPU)
    for stage in stages.values():
        initialise_parameters(stage.named_parameters(), model.local_experts(), config.model, config.seed.init)
        for _, buffer in stage.named_buffers():
            buffer.zero_()
    return [*stages.values()], Surroundings(InlineChannel(), model.store, **surroundings)


def stage_gradients(config, numerics, batch, share):
    """Gradients of rows of `batch`, each weighing `share`: a list by name, the embedding's and the MTP embedding's."""
    stages, around = stages_here(config, numerics, 2)
    for number, row in enumerate(torch.split(batch, 1)):
        given = Microbatch(row, Weights(share, MTP, ALPHA, train=True))
        passes, hidden = [StagePass(stage, around, given, number) for stage in stages], None
        for passing in passes:
            hidden = run_steps(passing.forward(hidden, Results()))
        for passing in reversed(passes):
            hidden = run_steps(passing.backward(hidden, around.store.do))
    found = {}
    for name, parameter in (pair for stage in stages for pair in stage.named_parameters()):
        found.setdefault(name, []).append(parameter.grad)
    return found


def distance(ours, theirs):
    """Largest relative difference by norm over all names."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n].double() - theirs[n].double()).norm() / (theirs[n].double().norm() + 1e-30)) for n in ours
    )


def worst(ours, theirs):
    """Largest relative difference of numbers, over nested lists of the same shape."""
    ours, theirs = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return ((ours - theirs).abs() / theirs.abs()).max().item()
