"""A small V3 model trained through the engine, and the same without it, for tests of the pipeline."""

from dataclasses import replace

import torch

from headrace.config.compose import load
from headrace.fp8.numerics import Numerics
from headrace.model.initialisation import initialise
from headrace.model.transformer import Transformer
from headrace.parallel.mesh import Mesh
from headrace.pipeline.engine import Engine
from headrace.training.optimizer import stays_whole

MTP, ALPHA = 0.3, 0.01


def configuration(experts=8, layers=4, **parallel):
    """A tree of experiment=tiny with a model of `layers` layers, one of them dense, MoE, MTP; 8 rows a step."""
    config = load(["experiment=tiny"])
    model = replace(
        config.model, num_hidden_layers=layers, first_k_dense_replace=1, n_routed_experts=experts, n_group=4,
        topk_group=2, num_experts_per_tok=3, num_nextn_predict_layers=1,
    )  # fmt: skip
    recipe = replace(config.recipe, batch_sequences=8, sequence_length=16)
    layout = replace(config.parallel, **({"microbatch": 1} | parallel))
    return replace(config, model=model, recipe=recipe, parallel=layout)


def rows(config, step=0, count=8):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, config.model.vocab_size, (count, config.recipe.sequence_length + 2), generator=generator)


def engine(config, numerics, rank=0, **arguments):
    mesh = Mesh.of(config.parallel, rank)
    whole = lambda name, shape: stays_whole(config.recipe.optimizer, name, shape)  # noqa: E731
    return Engine(config, numerics, mesh, torch.device("cpu"), whole, **arguments)


def local(engine, batch):
    """This data rank's rows."""
    share = len(batch) // engine.mesh.data
    return batch[engine.mesh.data_rank * share :][:share]


def reference(config, numerics):
    model = Transformer(config.model, numerics).to(torch.float64 if numerics.dtype == torch.float64 else torch.float32)
    initialise(model, config.model, config.seed.init)
    return model


def reference_step(model, batch, size=1):
    """Losses (main, mtp, balance) and counts of one step by plain autograd; gradients in `.grad`."""
    parts = torch.split(batch, size)
    sums, counts = torch.zeros(3, dtype=torch.float64), 0
    for part in parts:
        losses = model.losses(part, MTP, ALPHA)
        (losses.total / len(parts)).backward()
        sums += torch.stack([losses.main, losses.mtp, losses.balance]).detach().double() / len(parts)
        counts = counts + losses.counts
    return sums.tolist(), counts.tolist()


def gradients(engine):
    """Whole gradients by name, on rank 0."""
    from headrace.parallel.assembly import gather

    pieces = [piece.of(piece.name, piece.tensor.grad) for piece in engine.reduction.pieces]
    return gather(pieces, engine.mesh, torch.device("cpu"))


def distance(ours, theirs):
    """Largest relative difference by norm over all names."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n].double() - theirs[n].double()).norm() / (theirs[n].double().norm() + 1e-30)) for n in ours
    )


def numerics_of(name, config):
    return Numerics.resolve(config.precision, torch.device("cpu")) if name == "fp8" else Numerics(name)
