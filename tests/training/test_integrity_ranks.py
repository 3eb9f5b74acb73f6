"""Silent corruption on two real ranks: DualPipe, and expert parallelism under overlapped pairs."""

import random
from dataclasses import replace

import pytest
import torch

from flips import KINDS, Struck
from headrace.training.integrity import MEMORY, RECOMPUTATION, REPLICAS, CorruptionError, Integrity
from headrace.training.optimizer import Optimizer
from pipeline_runs import ALPHA, BIAS_SPEED, MTP, configuration, engine, layout, local, numerics_of, rows, update
from ranks import run_ranks

pytestmark = pytest.mark.alone

HERE = "training/test_integrity_ranks.py"
LAYOUTS = {"DualPipe": layout("dualpipe"), "experts on 2 ranks": layout("dualpipe_v", pipeline=1, expert=2)}
TRIALS, SIZE = 12, 2.0**-12  # of each kind of flip and layout; see test_integrity.py for the size


def everything(rank, world):
    """All that is asked of the ranks in one start of them, by layout."""
    return {
        name: {
            "clean": _clean(rank, "fp8", parallel),
            "flips": _flips(rank, world, parallel),
            "copies": {part.__name__: _found(rank, parallel, part) for part in (_memory, _sharing, _bias)},
        }
        for name, parallel in LAYOUTS.items()
    }


class Run:
    """Trains as the trainer does, with `damage(step, when)` called before every update and after every sharing."""

    def __init__(self, rank, precision, parallel, verify=1, recompute=0, damage=None):
        self.config = configuration(precision, model={"num_hidden_layers": 2}, **parallel)
        self.engine = engine(self.config, numerics_of(precision, self.config), rank)
        self.optimizer = Optimizer(self.engine.reduction.pieces, self.config.recipe.optimizer, self.config.precision)
        settings = replace(self.config.launch, verify_every=verify, recompute_every=recompute)
        self.integrity = Integrity(self.engine, self.optimizer, settings, 0)
        self.damage = damage or (lambda *_: None)

    def step(self, step):
        running, integrity = self.engine, self.integrity
        batch = local(running, rows(self.config, step, 4))
        take = lambda: running.step(batch, MTP, ALPHA, f"step {step + 1}")  # noqa: E731
        losses = integrity.recompute(take, step) if integrity.recomputes(step) else take()
        running.reduction.clip(1.0, running.reduction.norm())
        self.damage(step, "before the update")
        integrity.before_update(step)
        update(self.optimizer, 1e-3, step)
        running.reduction.share()
        running.update_router_bias(losses.counts, BIAS_SPEED)
        self.damage(step, "after sharing")
        integrity.after_update(step)
        running.recycle()

    def state(self):
        return [*self.engine.everything(), *self.optimizer.moments()]


def _clean(rank, precision, parallel):
    """Two steps with every check give the same state, to the bit, as without any."""
    states = []
    for checks in (1, 0):
        run = Run(rank, precision, parallel, verify=checks, recompute=checks)
        for step in range(2):
            run.step(step)
        states.append(run.state())
        run.engine.close()
    return all(torch.equal(a.tensor, b.tensor) for a, b in zip(*states, strict=True))


def _flips(rank, world, parallel):
    """By trial: the kind, who was struck, at which action, the size of it, and what was found."""
    config = configuration("fp32", model={"num_hidden_layers": 2}, **parallel)
    struck, rng = Struck(config, "fp32", rows(config, count=4), rank), random.Random(0)
    told = []
    for trial in range(TRIALS * len(KINDS)):
        kind, victim = KINDS[trial % len(KINDS)], rng.randrange(world)
        struck.where, struck.size = None, None
        if rank == victim:
            struck.aim(kind, trial)
        found = struck.twice()
        told.append([kind, victim, struck.where, struck.size, found and [found.check, list(found.ranks), found.what]])
    struck.running.close()
    return told


def _found(rank, parallel, part):
    """The facts of the corruption that is found after `part` did its damage, or None."""
    verify, damage = part(rank)
    run = Run(rank, "fp32", parallel, verify=verify)
    run.damage = lambda step, when: damage(run, step, when)
    try:
        for step in range(8):
            run.step(step)
    except CorruptionError as error:
        return error.facts
    finally:
        run.engine.close()
    return None


def _memory(rank):
    """Rank 1 changes a weight that rank 0 owns, while a step is computed: the next sharing would undo it."""

    def damage(run, step, when):
        if rank == 1 and (step, when) == (2, "before the update"):
            _of_another(run).add_(1e-3)

    return 1, damage


def _sharing(rank):
    """A weight arrives wrong at rank 1."""

    def damage(run, step, when):
        if rank == 1 and when == "after sharing" and step == 1:
            _of_another(run).add_(1e-3)

    return 1, damage


def _bias(rank):
    """A router bias changes on rank 1 between two checks."""

    def damage(run, step, when):
        if rank == 1 and (step, when) == (1, "before the update"):
            run.engine.replicas()[-1][0].tensor[0] += 0.5

    return 4, damage


def _of_another(run):
    """The only element of a view: a weight that both ranks hold and the other one owns."""
    owned = {(piece.name, element) for piece in run.engine.reduction.pieces for element in _elements(piece)}
    (piece, element), *_ = (
        (piece, element)
        for group in run.engine.reduction.replicas
        for piece in group
        for element in (0, piece.tensor.numel() - 1)
        if (piece.name, piece.start + element) not in owned
    )
    return piece.tensor.detach().view(-1)[element : element + 1]


def _elements(piece):
    return (piece.start + element for element in range(piece.tensor.numel()))


@pytest.fixture(scope="module")
def told():
    """By layout what each rank said."""
    results = run_ranks(2, HERE, "everything", seconds=500)
    return {name: [result[name] for result in results] for name in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def ranks(request, told):
    return told[request.param]


def test_a_clean_run_raises_nothing_and_is_the_same_run_to_the_bit(ranks):
    assert [said["clean"] for said in ranks] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_that_a_flip_struck_is_named_with_its_action_on_all_ranks(ranks, kind):
    large = []
    for zero, one in zip(*(said["flips"] for said in ranks), strict=True):
        of, victim, *_, found = zero
        assert found == one[-1]
        _, _, where, size, _ = (zero, one)[victim]
        if of != kind:
            continue
        if size >= SIZE:
            large.append(found is not None)
        if found:
            check, named, what = found
            assert (check, named) == (RECOMPUTATION, [victim])
            assert any(f" of {action} came out" in what for action in (where, where.replace("I", "W")))
    assert len(large) > 2
    assert all(large)


def test_a_weight_changed_on_rank_1_is_found_and_the_rank_named(ranks):
    for said in ranks:
        facts = said["copies"]["_memory"]
        assert (facts["check"], facts["ranks"], facts["step"]) == (MEMORY, [1], 3)
        assert facts["what"].startswith("rank 1: ") and facts["what"].endswith(
            " changed in memory since the last update"
        )


def test_a_weight_that_arrives_wrong_is_found_before_the_next_update(ranks):
    for said in ranks:
        facts = said["copies"]["_sharing"]
        assert (facts["check"], facts["ranks"], facts["step"]) == (REPLICAS, [0, 1], 3)
        assert "without a majority" in facts["what"]


def test_biases_that_part_are_found_within_the_interval(ranks):
    for said in ranks:
        facts = said["copies"]["_bias"]
        assert (facts["check"], facts["ranks"], facts["step"]) == (REPLICAS, [0, 1], 5)
        assert facts["what"].endswith("gate.e_score_correction_bias")
