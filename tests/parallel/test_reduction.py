"""Ranks that share parameters against one process that has them all and adds all gradients."""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from headrace.checkpoint.reader import checkpoint_folder, newest_valid, open_checkpoint
from headrace.checkpoint.writer import Writer, publish
from headrace.config.compose import load
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.parallel.assembly import exchange, fill, names_everywhere
from headrace.parallel.mesh import Groups, Mesh
from headrace.parallel.reduction import GradientReduction, Held
from headrace.parallel.shards import pieces_of
from headrace.training.optimizer import Optimizer, stays_whole
from ranks import run_ranks

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")
EMBED, IDLE = "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"
LAYERS = 12  # names in alphabetical order are not in the order of layers
LAYER: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (16,),
    "mlp.experts.up_proj.weight": (4, 24, 16),
    "mlp.gate.weight": (4, 16),
    "self_attn.o_proj.weight": (16, 32),
    "self_attn.q_proj.weight": (35, 16),
}
SHAPES = {
    EMBED: (40, 16),
    "lm_head.weight": (40, 16),
    "model.norm.weight": (16,),
    **{f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER.items()},
}
STEPS, RATES = 3, (1e-2, 2e-2)


def drawn(*shape: int, seed: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def contribution(name: str, end: str, replica: int, step: int) -> Tensor | None:
    """The gradient that one copy of a parameter gets; one router's is missing in the first step and later on copies."""
    if name == IDLE and (step == 0 or replica > 0):
        return None
    return drawn(*SHAPES[name], seed=f"{name} {end} {replica} {step}")


def total(name: str, replicas: int, step: int) -> Tensor:
    ends = ("first", "last") if name == EMBED else ("",)
    parts = [contribution(name, end, replica, step) for replica in range(replicas) for end in ends]
    return sum((part for part in parts if part is not None), torch.zeros(SHAPES[name]))


def stage_names(stage: int, stages: int) -> Iterator[tuple[str, str]]:
    if stage == 0:
        yield EMBED, "first"
    for layer in range(LAYERS * stage // stages, LAYERS * (stage + 1) // stages):
        yield from ((f"model.layers.{layer}.{name}", "") for name in LAYER)
    if stage == stages - 1:
        yield from (("model.norm.weight", ""), ("lm_head.weight", ""), (EMBED, "last"))


def places(kind: str, pipeline: int, stage: int) -> list[int]:
    """The pipeline ranks of a stage."""
    return {"chain": [stage], "v": [min(stage, 2 * pipeline - 1 - stage)], "mirror": [stage, pipeline - 1 - stage]}[
        kind
    ]


class Run:
    """A rank's stages, their gradients, and what is to be tested."""

    def __init__(self, rank: int, kind: str, mesh: tuple[int, int, int], name: str, moments: str) -> None:
        self.mesh = Mesh(*mesh, node_size=1, rank=rank)
        self.store, stages = WeightGradientStore(), mesh[0] * (2 if kind == "v" else 1)
        self.ends: list[tuple[Held, str, int]] = []
        for stage in range(stages):
            for direction, place in enumerate(places(kind, mesh[0], stage)):
                if place == self.mesh.pipeline_rank:
                    self.ends += [
                        (self.held(n, kind, stage, stages), end, direction) for n, end in stage_names(stage, stages)
                    ]
        config = load([])
        self.optimizer_config = replace(config.recipe.optimizer, name=name)
        groups = Groups(self.mesh, timedelta(seconds=30))
        self.held_all = [held for held, _, _ in self.ends]
        whole = partial(stays_whole, self.optimizer_config)
        self.reduction = GradientReduction(self.held_all, self.mesh, groups, self.store, whole, CPU)
        precision = replace(config.precision, optimizer_moments=moments, compute="fp32")
        self.optimizer = Optimizer(self.reduction.pieces, self.optimizer_config, precision)

    def held(self, name: str, kind: str, stage: int, stages: int) -> Held:
        experts = "experts" in name and self.mesh.expert > 1
        of = (0, stages - 1) if name == EMBED else (stage,)
        where = {place for s in of for place in places(kind, self.mesh.pipeline, s)}
        start = drawn(*SHAPES[name], seed=name)
        return Held(
            name, Parameter(self.local(start, experts).clone()), stage, self.mesh.copies(where, experts), experts
        )

    def local(self, whole: Tensor, experts: bool) -> Tensor:
        return whole.chunk(self.mesh.expert)[self.mesh.expert_rank] if experts else whole

    def step(self, step: int, limit: float) -> float:
        for held, end, direction in self.ends:
            data = self.mesh.data // self.mesh.expert if held.experts else self.mesh.data
            replica = direction * data + (
                self.mesh.data_rank // self.mesh.expert if held.experts else self.mesh.data_rank
            )
            gradient = contribution(held.name, end, replica, step)
            if gradient is None:
                continue
            gradient = self.local(gradient, held.experts)
            if gradient.ndim == 1:
                held.parameter.grad = gradient  # as autograd does
            else:
                buffer, fresh = self.store.gradient(held.parameter)
                assert fresh
                buffer.copy_(gradient)
        stages = sorted({held.stage for held in self.held_all}, reverse=bool(self.mesh.rank % 2))
        for stage in stages[: len(stages) - step % 2]:  # ranks disagree about the order; the last is left to finish()
            self.reduction.start(stage)
        self.reduction.finish()
        norm = self.reduction.norm()
        self.reduction.clip(limit, norm)
        self.optimizer.step(*RATES)
        self.reduction.share()
        self.store.recycle(held.parameter for held in self.held_all)
        return norm.item()

    def save(self, folder: Path) -> None:
        writer = Writer(folder, self.mesh.rank)
        writer.begin(2, "only", {"model": self.reduction.pieces, "optimizer": self.optimizer.moments()})
        writer.wait()
        said = exchange(writer.take().files, self.mesh, CPU)
        if self.mesh.rank == 0:
            publish(folder, 2, "only", said, {})
        exchange(None, self.mesh, CPU)

    def load(self, folder: Path) -> None:
        saved = open_checkpoint(checkpoint_folder(folder, 2))
        for kind, pieces in (("model", self.reduction.everything), ("optimizer", self.optimizer.moments())):
            fill(pieces, names_everywhere(pieces, self.mesh, CPU), saved.tensors(kind))
        self.optimizer.load_state({"updates": 2})


def body(rank: int, world: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case_body(rank, **case) for case in cases]


def case_body(
    rank: int, kind: str, mesh: tuple[int, int, int], name: str, moments: str, limit: float, folder: str,
    source: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run all steps, or those after the two that `source` has, and save after two and at the end into `folder`."""
    run = Run(rank, kind, mesh, name, moments)
    if source:
        run.load(Path(source))
    norms = []
    for step in range(2 if source else 0, STEPS):
        norms.append(run.step(step, limit).hex())
        if step == 1 and folder:
            run.save(Path(folder, "two"))
    if folder:
        run.save(Path(folder, "end"))
    return {
        "norms": norms,
        "values": [
            [held.name, held.copies, hashlib.sha256(held.parameter.detach().numpy().tobytes()).hexdigest()]
            for held in run.held_all
        ],
        "owned": sum(piece.tensor.numel() for piece in run.reduction.pieces),
        "bytes": sum(piece.tensor.nbytes for piece in run.optimizer.moments()),
    }


def single(
    name: str, moments: str, limit: float, replicas: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Values, moments and norms after all steps in one process that adds gradients itself."""
    config = load([])
    tensors = {key: drawn(*shape, seed=key) for key, shape in SHAPES.items()}
    precision = replace(config.precision, optimizer_moments=moments, compute="fp32")
    optimizer = Optimizer(pieces_of(tensors.items()), replace(config.recipe.optimizer, name=name), precision)
    norms = []
    for step in range(STEPS):
        for key, tensor in tensors.items():
            tensor.grad = total(key, replicas["experts" if "experts" in key else "rest"], step)
        norm = (
            torch.stack([t.grad.double().square().sum() for t in tensors.values() if t.grad is not None]).sum().sqrt()
        )
        norms.append(norm.item())
        torch.nn.utils.clip_grads_with_norm_(tensors.values(), limit, norm.float())
        optimizer.step(*RATES)
    return tensors, {piece.name: piece.tensor for piece in optimizer.moments()}, norms


def saved(folder: Path, kind: str) -> dict[str, Tensor]:
    """Whole tensors of the checkpoint that is there, every byte verified."""
    found = newest_valid(folder)
    assert found is not None
    return {name: found.get(kind, name) for name in found.names(kind)}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], exact: set[str], moments: str) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if key.rpartition("/")[0] in exact or key in exact:
            assert torch.equal(found[key], tensor), key
        else:
            tolerance = 2e-6 if moments == "fp32" else 1e-2  # a last bit of the sum may turn a rounding to BF16
            torch.testing.assert_close(found[key], tensor.to(found[key].dtype), rtol=tolerance, atol=tolerance)


def case(kind: str, *mesh: int, name: str, moments: str = "fp32", limit: float = 1e9) -> dict[str, Any]:
    return {"kind": kind, "mesh": mesh, "name": name, "moments": moments, "limit": limit}


LOOSE = {"name": "muon", "moments": "bf16"}
CASES = {  # and the number of copies of what is no expert
    "data": (case("chain", 1, 2, 1, **LOOSE), 2),
    "mirror": (case("mirror", 2, 1, 1, name="muon"), 2),
    "two stages": (case("chain", 2, 1, 1, name="muon", limit=1.0), 1),
    "v": (case("v", 2, 1, 1, name="muon", limit=1.0), 1),
    "mirror of four": (case("mirror", 4, 1, 1, name="adamw"), 2),
    "v with experts": (case("v", 2, 2, 2, name="adamw", moments="bf16"), 2),
    "mirror with experts": (case("mirror", 2, 2, 2, name="muon", limit=1.0), 4),
    "data with experts": (case("chain", 1, 4, 2, name="adamw", limit=1.0), 4),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """The folder of each case and what its ranks returned; "resumed" goes on where "data" was after two steps."""
    root = tmp_path_factory.mktemp("reduction")
    wanted = {name: given for name, (given, _) in CASES.items()}
    wanted["resumed"] = case("chain", 2, 2, 1, **LOOSE) | {"source": str(root / "data/two")}
    results = {}
    for world in (2, 4):
        cases = {name: given for name, given in wanted.items() if given["mesh"][0] * given["mesh"][1] == world}
        for name, given in cases.items():
            given["folder"] = str(root / name)
        ranks = run_ranks(world, "parallel/test_reduction.py", "body", cases=list(cases.values()))
        results |= {name: (root / name, [rank[i] for rank in ranks]) for i, name in enumerate(cases)}
    return results


@pytest.mark.parametrize("name", CASES)
def test_ranks_follow_one_process(ran: dict[str, tuple[Path, list[dict[str, Any]]]], name: str) -> None:
    (folder, ranks), (given, copies) = ran[name], CASES[name]
    replicas = {"rest": copies, "experts": copies // given["mesh"][2]}
    values, states, norms = single(given["name"], given["moments"], given["limit"], replicas)
    exact = {key for key in SHAPES if copies <= 2 and given["limit"] > 1 and key != EMBED}
    compare(saved(folder / "end", "model"), values, exact, "fp32")
    compare(saved(folder / "end", "optimizer"), states, exact, given["moments"])
    assert len({tuple(rank["norms"]) for rank in ranks}) == 1
    assert [float.fromhex(norm) for norm in ranks[0]["norms"]] == pytest.approx(norms, rel=1e-7)

    hashes: dict[tuple[str, tuple[int, ...]], set[str]] = {}
    for rank in ranks:
        for held, copies_of, digest in rank["values"]:
            hashes.setdefault((held, tuple(copies_of)), set()).add(digest)
    assert {len(found) for found in hashes.values()} == {1}, "copies differ"
    assert sum(rank["owned"] for rank in ranks) == sum(tensor.numel() for tensor in values.values())
    share = sum(state.nbytes for state in states.values()) / len(ranks)
    assert all(rank["bytes"] == pytest.approx(share, rel=0.2) for rank in ranks)


def test_the_norm_does_not_depend_on_the_pipeline(ran: dict[str, tuple[Path, list[dict[str, Any]]]]) -> None:
    """One copy of everything: one process, and a chain and a V of 2 ranks, the two embeddings on one rank or two."""
    alone = case_body(0, **case("chain", 1, 1, 1, name="muon", limit=1.0), folder="")["norms"]
    for name in ("two stages", "v"):
        assert all(rank["norms"] == alone for rank in ran[name][1])


def test_a_checkpoint_of_one_layout_goes_on_under_another(ran: dict[str, tuple[Path, list[dict[str, Any]]]]) -> None:
    for kind in ("model", "optimizer"):
        straight, resumed = (saved(ran[name][0] / "end", kind) for name in ("data", "resumed"))
        assert straight.keys() == resumed.keys()
        for key, tensor in straight.items():
            if key.startswith(EMBED):  # four gradients on four ranks here, two sums of two there
                torch.testing.assert_close(resumed[key], tensor, rtol=1e-2, atol=2e-6)
            else:
                assert torch.equal(resumed[key], tensor), key


def test_a_single_process_moves_and_copies_nothing() -> None:
    run = Run(0, "v", (1, 1, 1), "muon", "fp32")
    pieces = {piece.name: piece.tensor for piece in run.reduction.pieces}
    assert len(pieces) == len(SHAPES)
    first, last = (held.parameter for held in run.held_all if held.name == EMBED)
    assert pieces[EMBED] is first
    assert first.data_ptr() == last.data_ptr()
    assert all(pieces[held.name] is held.parameter for held in run.held_all if held.parameter is not last)
