"""Silent corruption: single bits flipped in memory and in computations are found and named; a clean run raises nothing.

In one process the toy of `toy_run.py` and a small V3 model; on real ranks `test_integrity_ranks.py`.
"""

import json
import random
from dataclasses import replace

import pytest
import torch

from flips import KINDS, Struck, flip
from headrace.training import integrity
from headrace.training.integrity import MEMORY, RECOMPUTATION, REPLICAS, CorruptionError, Integrity
from headrace.training.learner import build_engine
from headrace.training.optimizer import Optimizer
from pipeline_runs import configuration, rows
from toy_run import ToyLearner, ToyModel, toy_batch, toy_config

SIZE = {"fp32": 2.0**-12, "bf16": 2.0**-6}
"""Flips that change an element by so much of its tensor's root mean square must be found; rounding hides smaller ones,
where an output of attention or of an expert is added to a residual in the compute format."""
TRIALS = 60


class Toy:
    """The toy with optimizer and integrity, stepping as the trainer does."""

    def __init__(self, verify=1, recompute=1, checked=True, **precision):
        config = toy_config()
        self.learner = ToyLearner(ToyModel(), config)
        kind = replace(config.precision, **precision)
        self.optimizer = Optimizer(self.learner.reduction.pieces, config.recipe.optimizer, kind)
        settings = replace(config.launch, verify_every=verify, recompute_every=recompute)
        self.integrity = Integrity(self.learner, self.optimizer, settings, 7) if checked else None

    def step(self, step):
        learner, integrity = self.learner, self.integrity
        take = lambda: learner.step(toy_batch(4 * step, 4), 0, 0, "")  # noqa: E731
        losses = integrity.recompute(take, step) if integrity and integrity.recomputes(step) else take()
        learner.reduction.clip(1.0, learner.reduction.norm())
        if integrity:
            integrity.before_update(step)
        self.optimizer.step(1e-3, 1e-3)
        learner.reduction.share()
        learner.update_router_bias(losses.counts, 1e-3)
        if integrity:
            integrity.after_update(step)
        learner.recycle()

    def state(self):
        return [*self.learner.everything(), *self.optimizer.moments()]


def test_a_clean_run_raises_nothing_and_is_the_same_run():
    checked, plain = Toy(), Toy(checked=False)
    for step in range(100):
        checked.step(step)
        plain.step(step)
    pairs = zip(checked.state(), plain.state(), strict=True)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in pairs)
    updates = checked.learner.model.bias_updates
    assert updates == plain.learner.model.bias_updates  # tokens and losses are counted once


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_ten_thousand_clean_steps_raise_nothing():
    toy = Toy()
    for step in range(10_000):
        toy.step(step)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])  # FP32: the fused AdamW, which raises no version counter
def test_every_bit_that_flips_in_memory_is_found_and_its_tensor_named(moments):
    toy, rng = Toy(recompute=0, optimizer_moments=moments), random.Random(0)
    toy.step(0)
    names = {piece.name for piece in toy.state()}
    assert {"e_score_correction_bias", "norm.weight/exp_avg", "experts.weight/momentum", "lm_head.weight"} <= names
    for trial in range(1, 401):
        piece = rng.choice(toy.state())
        before = piece.tensor.detach().clone()
        flip(piece.tensor, rng)
        with pytest.raises(CorruptionError) as raised:
            toy.step(trial)
        assert str(raised.value) == (
            f"silent corruption found at step {trial + 1}: rank 0: {piece.name} changed in memory since the last update"
        )
        with torch.no_grad():
            piece.tensor.copy_(before)
        toy.learner.recycle()
        toy.integrity.after_update(trial)


def test_what_was_found_can_be_written_into_a_ledger():
    toy = Toy(recompute=0)
    toy.step(0)
    for piece in toy.state():
        flip(piece.tensor, random.Random(1))
    with pytest.raises(CorruptionError, match="and 11 more tensors changed") as raised:
        toy.step(1)
    facts = json.loads(json.dumps(raised.value.facts))
    assert facts == {"step": 2, "check": MEMORY, "ranks": [0], "what": raised.value.found.what}


def test_memory_is_looked_at_every_so_many_steps_and_not_after_a_rollback():
    toy = Toy(verify=3, recompute=0)
    for step in range(2):
        toy.step(step)
        flip(toy.state()[0].tensor, random.Random(step))
    toy.step(2)
    flip(toy.state()[0].tensor, random.Random(5))
    toy.integrity.replaced(3)
    toy.step(3)
    for step in (4, 5):
        toy.step(step)
    flip(toy.state()[0].tensor, random.Random(6))
    with pytest.raises(CorruptionError, match="at step 7"):
        toy.step(6)
    idle = Toy(verify=0, recompute=0)
    idle.step(0)
    flip(idle.state()[0].tensor, random.Random(7))
    idle.step(1)


def test_one_random_step_of_each_window_is_computed_twice():
    toy, launch = Toy(), toy_config().launch

    def drawn(seed, every):
        settings = replace(launch, recompute_every=every)
        integrity = Integrity(toy.learner, toy.optimizer, settings, seed)
        return [step for step in range(1000) if integrity.recomputes(step)]

    steps = drawn(3, 20)
    assert [step // 20 for step in steps] == list(range(50))
    assert len({step % 20 for step in steps}) > 10
    assert steps == drawn(3, 20) != drawn(4, 20)
    assert drawn(3, 1) == list(range(1000))
    assert drawn(3, 0) == []


@pytest.fixture(scope="module", params=[("fp32", "zb_v"), ("bf16", "dualpipe_v")], ids=str)  # F, I, W; pairs and B
def struck(request):
    precision, schedule = request.param
    small = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    config = configuration(precision, model=small, schedule=schedule)
    return SIZE[precision], Struck(config, precision, rows(config, count=2))


@pytest.mark.parametrize("kind", KINDS)
def test_flips_in_a_computation_are_found_and_the_action_named(struck, kind):
    least, struck = struck
    expected, found, large, named = struck.result(), 0, [], 0
    for trial in range(TRIALS):
        struck.aim(kind, trial)
        corruption = struck.twice()
        size, where = struck.size, struck.where
        if size >= least:
            large.append(corruption is not None)
        if corruption is None:  # then it was lost in rounding, and the step is the same
            struck.aim(kind, trial)
            assert all(map(torch.equal, struck.result(), expected))
            continue
        assert corruption.check == RECOMPUTATION
        assert corruption.ranks == (0,)
        found += 1
        # A flip in what I keeps for W shows in W.
        named += any(f" of {action} came out" in corruption.what for action in (where, where.replace("I", "W")))
    print(f"{kind}: {found} of {TRIALS} found, {named} with their action; {sum(large)} of {len(large)} large ones")
    assert sum(large) >= 0.99 * len(large)
    assert len(large) > TRIALS / 4
    assert named == found


@pytest.mark.parametrize(
    ("values", "ranks", "what"),
    [
        ([1, 1, 2], [2], "rank 2: other values than the majority of copies hold of norm.weight"),
        ([3, 1, 1, 2], [0, 1, 2, 3], "ranks 0, 1, 2, 3, without a majority, hold different values of norm.weight"),
        ([1, 2, None], [0, 1], "ranks 0, 1, without a majority, hold different values of norm.weight"),
        ([1, 1, 2, 3, 1], [2, 3], "ranks 2, 3: other values than the majority of copies hold of norm.weight"),
    ],
)
def test_of_differing_copies_the_majority_is_right(monkeypatch, values, ranks, what):
    """What other ranks say of their copies is made up; None is a rank that has none."""
    toy = Toy(recompute=0)
    group = [piece for piece in toy.state() if piece.name in ("norm.weight", "gate.weight")]
    toy.learner.replicas = lambda: [group]

    def said(value, *_):
        if isinstance(value, list):  # by group
            name = group[0].name
            return [[[], 0, {name: mine} if mine else {}] for mine in values]
        return [{"norm.weight": mine, "gate.weight": 5} if mine else {} for mine in values]

    monkeypatch.setattr(toy.learner, "agreed_all", said)
    toy.step(0)
    with pytest.raises(CorruptionError) as raised:
        toy.step(1)
    assert raised.value.facts == {"step": 2, "check": REPLICAS, "ranks": ranks, "what": what}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would compute a step twice on a GPU and compare its bits")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_clean_step_computed_twice_on_a_gpu_is_the_same(precision):
    config, device = configuration(precision), torch.device("cuda", 0)
    running = build_engine(config, device)
    optimizer = Optimizer(running.reduction.pieces, config.recipe.optimizer, config.precision)
    settings = replace(config.launch, verify_every=1, recompute_every=1)
    watching, batch = integrity.Integrity(running, optimizer, settings, 0), rows(config).to(device)
    for step in range(5):
        watching.recompute(lambda: running.step(batch, 0.3, 1e-4, "step"), step)
        watching.before_update(step)
        optimizer.step(1e-3, 1e-3)
        watching.after_update(step)
        running.recycle()
    running.close()
