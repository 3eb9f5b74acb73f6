"""The engine against plain autograd in one process, whatever the layout: gradients, norms, losses, scores."""

import hashlib

import pytest
import torch

from headrace.errors import UserError
from headrace.fp8.numerics import Numerics
from pipeline_runs import (
    ALPHA,
    EOS,
    MTP,
    SCHEDULES,
    configuration,
    distance,
    documents,
    engine,
    figures,
    gradients,
    layout,
    local,
    numerics_of,
    present,
    reference,
    reference_step,
    reference_train,
    rows,
    stage_gradients,
    train,
    worst,
)
from ranks import run_ranks

pytestmark = pytest.mark.alone

HERE = "pipeline/test_engine.py"
LIMIT = {"fp64": 1e-10, "fp32": 1e-5}
SIZES = {2: [(2, 1, 1)], 4: [(2, 2, 1), (2, 2, 2), (4, 1, 1)]}  # by ranks: pipeline, expert, node size
CASES = {
    f"{schedule} PP{pipeline} EP{expert} nodes of {node} {compute}": (
        world, compute, layout(schedule, pipeline, expert, node),
    )
    for world, sizes in SIZES.items()
    for pipeline, expert, node in sizes
    for schedule in SCHEDULES
    for compute in LIMIT
}  # fmt: skip
CASES["interleaved_1f1b PP2 fp64"] = 2, "fp64", layout("interleaved_1f1b")
CASES["layers 3,1 fp64"] = 2, "fp64", layout("dualpipe") | {"layers": (3, 1)}
CASES["layers 0,4 fp64"] = 2, "fp64", layout("1f1b") | {"layers": (0, 4)}
CASES["layers 4,0 fp64"] = 2, "fp64", layout("dualpipe") | {"layers": (4, 0)}
CASES["layers 1,0,3,0 fp64"] = 2, "fp64", layout("dualpipe_v") | {"layers": (1, 0, 3, 0)}


def compare(rank, world):
    """Rank 0: by case, differences of losses and gradients from one process, and whether the counts are equal."""
    cases = {name: rest for name, (ranks, *rest) in CASES.items() if ranks == world}
    expected = {compute: _expected(compute) for compute in LIMIT} if rank == 0 else None
    found = {}
    for name, (compute, parallel) in cases.items():
        print(name, flush=True)  # the last one in the log is the one that failed
        found[name] = _compare(rank, compute, parallel, expected and expected[compute])
    return found


def apart(rank, world):
    """The same in float64 for rows whose documents do not see each other."""
    expected = _expected("fp64", EOS)
    cases = {
        name: parallel for name, (ranks, compute, parallel) in CASES.items() if (ranks, compute) == (world, "fp64")
    }
    return {name: _compare(rank, "fp64", parallel, expected, EOS) for name, parallel in cases.items()}


def _expected(compute, eos=None):
    config = configuration()
    model = reference(config, numerics_of(compute, config))
    batch = _batch(config, eos)
    (main, mtp, balance), counts = reference_step(model, batch, eos=eos)
    if eos is not None:  # the engine's are means over the targets that are there
        main, mtp = main / present(batch, 1), mtp / present(batch, 2)
    return [main, mtp, balance], counts, {name: parameter.grad for name, parameter in model.named_parameters()}


def _batch(config, eos):
    return rows(config) if eos is None else documents(config)


def _compare(rank, compute, parallel, expected, eos=None):
    config = configuration(**parallel)
    numerics = numerics_of(compute, config)
    running = engine(config, numerics, rank, eos=eos)
    losses = running.step(local(running, _batch(config, eos)), MTP, ALPHA, "step 1")
    norm, found = running.reduction.norm().item(), gradients(running)
    running.close()
    if rank:
        return None
    theirs, counts, theirs_by_name = expected
    result = {
        "losses": worst(figures(losses), theirs),
        "gradients": distance(found, theirs_by_name),
        "counts": torch.equal(losses.counts, counts),
        "norm": norm.hex(),
    }
    if parallel.get("schedule") == "dualpipe" and compute == "fp32" and parallel["data"] == 1:
        halves = _halves(config, numerics)
        result["as two halves"] = all(torch.equal(found[name], halves[name]) for name in halves)
    return result


def _halves(config, numerics):
    """One process fed half of the microbatches, twice, and the sums in DualPipe's order: a + b.

    The embedding is held by both ends twice: rank 0 adds what its first stage saw of half a and its last one of half b.
    """
    batch = rows(config)
    a, b = (stage_gradients(config, numerics, half, 1 / len(batch)) for half in torch.split(batch, len(batch) // 2))
    tied = "model.embed_tokens.weight"
    (embed_a, ahead_a), (embed_b, ahead_b) = a.pop(tied), b.pop(tied)
    sums = {name: a[name][0] + b[name][0] for name in a}
    return sums | {tied: (embed_a + ahead_b) + (embed_b + ahead_a)}


def everything(rank, world):
    """All that is asked of so many ranks in one start of them, which takes longer than most of it."""
    return {part.__name__: part(rank, world) for part in (compare, apart, score, learn)}


@pytest.fixture(scope="module")
def started():
    """By number of ranks, what `everything` returned on each of them; started when first asked for."""
    found = {}

    def of(ranks):
        if ranks not in found:
            found[ranks] = None  # so that ranks that failed are not started again for every case
            found[ranks] = run_ranks(ranks, HERE, "everything", seconds=540)
        return found[ranks] or pytest.fail("these ranks failed when they were started for an earlier test")

    return of


@pytest.mark.parametrize("case", CASES)
def test_every_schedule_and_layout_gives_the_gradients_of_one_process(started, case):
    ranks, compute, _ = CASES[case]
    found = started(ranks)[0]["compare"][case]
    assert found["counts"]
    assert found["losses"] < LIMIT[compute]
    assert found["gradients"] < LIMIT[compute]


@pytest.mark.parametrize("case", [case for case, (_, compute, _) in CASES.items() if compute == "fp64"])
def test_documents_that_do_not_see_each_other_give_the_gradients_of_one_process(started, case):
    found = started(CASES[case][0])[0]["apart"][case]
    assert found["counts"]
    assert found["losses"] < LIMIT["fp64"]
    assert found["gradients"] < LIMIT["fp64"]


@pytest.mark.parametrize("compute", LIMIT)
def test_one_process_gives_the_gradients_of_plain_autograd(compute):
    found = _compare(0, compute, {}, _expected(compute))
    assert found["counts"]
    assert found["losses"] < LIMIT[compute]
    assert found["gradients"] < LIMIT[compute]


@pytest.mark.parametrize(
    ("ranks", "pipeline", "expert", "node"), [(ranks, *size) for ranks, sizes in SIZES.items() for size in sizes]
)
def test_the_gradient_norm_is_bitwise_equal_across_schedules_of_one_direction(started, ranks, pipeline, expert, node):
    found = started(ranks)[0]["compare"]
    norms = {
        schedule: found[f"{schedule} PP{pipeline} EP{expert} nodes of {node} fp32"]["norm"]
        for schedule in ("1f1b", "zb1p", "zb_v", "dualpipe_v")
    }
    assert len(set(norms.values())) == 1, norms


@pytest.mark.parametrize("pipeline", [2, 4])
def test_dualpipe_is_bitwise_equal_to_one_process_that_sums_its_two_halves(started, pipeline):
    assert started(pipeline)[0]["compare"][f"dualpipe PP{pipeline} EP1 nodes of 1 fp32"]["as two halves"]


def test_a_schedule_that_keeps_more_than_is_stated_of_it_does_not_run(monkeypatch):
    running = engine(configuration(schedule="dualpipe_v"), Numerics("fp32"))
    assert running.schedule(7).microbatches == 7
    monkeypatch.setattr("headrace.pipeline.engine.live_bound", lambda *_: 2)
    with pytest.raises(UserError, match="makes 3 live activations; at most 2 may be"):
        running.schedule(9)
    running.close()


MEASURED = [1, 5, 6, 8]  # rows


def score(rank, world):
    """Rank 0: by case and number of rows, differences of `measure` and of log probabilities from one process."""
    found = {}
    for schedule in ("1f1b", "dualpipe", "zb_v"):
        config = configuration(recipe={"batch_sequences": 16}, **layout(schedule, 2, world // 2) | {"microbatch": 2})
        numerics = numerics_of("fp64", config)
        running, model = engine(config, numerics, rank), reference(config, numerics)
        for count in MEASURED:
            batch = rows(config, count=count)
            measured = running.measure(batch, "validation")
            scores = running.token_log_probabilities(batch[:, :-1], "scores")
            with torch.no_grad():
                losses, theirs = model.losses(batch, 0, 0), model.token_log_probabilities(batch[:, :-1])
            found[f"{schedule}, {count} rows"] = {
                "losses": worst([measured.main.item(), measured.mtp.item()], [losses.main.item(), losses.mtp.item()]),
                "balance": measured.balance.item(),
                "counts": torch.equal(measured.counts, losses.counts),
                "scores": (scores - theirs).abs().max().item(),
            }
        running.close()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_validation_and_scores_are_those_of_one_process_also_where_rows_do_not_divide(started, ranks):
    for found in started(ranks):
        for case, figures_of in found["score"].items():
            assert figures_of["counts"], case
            assert figures_of["losses"] < 1e-10, case
            assert figures_of["balance"] == 0, case
            assert figures_of["scores"] < 2e-6, case


STEPS, COPIES_AFTER = 30, 20
LAYERS = 2  # and 4 over 4 pipeline ranks
LESS_USUAL = [
    (schedule, *size) for size in SIZES[4] for schedule in SCHEDULES if (schedule, size) != ("dualpipe", (2, 2, 1))
]


def learn(rank, world):
    """By schedule: what `_learned` says of two pipeline ranks."""
    schedules = SCHEDULES if world == 2 else ["dualpipe"]
    return {schedule: _learned(rank, schedule, 2, world // 2) for schedule in schedules}


def learn_more(rank, world):
    """The other layouts of four ranks."""
    found = []
    for case in LESS_USUAL:
        print(case, flush=True)
        found.append(_learned(rank, *case))
    return found


def _learned(rank, schedule, pipeline, expert, node_size=1):
    """Losses of every step, and digests of all that this rank holds after some of them."""
    parallel = layout(schedule, pipeline, expert, node_size) | {"microbatch": 2 if pipeline * expert == 2 else 1}
    config = configuration(model={"num_hidden_layers": max(LAYERS, pipeline)}, **parallel)
    running = engine(config, Numerics("fp32"), rank)
    curve, digests, first = [], {}, _digests(running)
    for losses, _ in train(running, config, STEPS):
        curve.append(losses)
        if len(curve) == COPIES_AFTER:
            digests = _digests(running)
    running.initialise()
    said = running.agreed_all({"rank": rank, "text": "x" * (rank + 1)})
    begun_anew, roles = _digests(running) == first, running.roles()
    running.close()
    return {"curve": curve, "digests": digests, "begun anew": begun_anew, "said": said, "roles": roles}


def _digests(running):
    return {f"{p.name} from {p.start}": _digest(p.tensor) for p in running.everything()}


def _digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def expected_curve():
    return _expected_curve(LAYERS)


def _expected_curve(layers):
    config = configuration(model={"num_hidden_layers": layers})
    return [losses for losses, _ in reference_train(reference(config, Numerics("fp32")), config, STEPS)]


@pytest.mark.parametrize(("schedule", "ranks"), [*((schedule, 2) for schedule in SCHEDULES), ("dualpipe", 4)])
def test_thirty_steps_follow_one_process(started, expected_curve, schedule, ranks):
    assert sum(expected_curve[-1]) < 0.9 * sum(expected_curve[0]), "nothing is learned, so nothing is compared"
    for result in started(ranks):
        assert worst(result["learn"][schedule]["curve"], expected_curve) < 1e-5


@pytest.mark.parametrize(("schedule", "ranks"), [*((schedule, 2) for schedule in SCHEDULES), ("dualpipe", 4)])
def test_ranks_hear_each_other_know_who_does_equal_work_and_can_begin_anew(started, schedule, ranks):
    everyone = [{"rank": rank, "text": "x" * (rank + 1)} for rank in range(ranks)]
    for result in started(ranks):
        found = result["learn"][schedule]
        assert found["said"] == everyone
        assert found["begun anew"]
        halves = found["roles"][: ranks // 2], found["roles"][ranks // 2 :]
        assert all(role == half[0] for half in halves for role in half)  # data ranks of one pipeline rank
        assert (found["roles"][0] == found["roles"][-1]) == (schedule == "dualpipe")


@pytest.mark.parametrize("ranks", [2, 4])
def test_copies_are_bitwise_equal_after_twenty_steps(started, ranks):
    digests = [result["learn"]["dualpipe"]["digests"] for result in started(ranks)]
    assert_copies_are_equal(digests, 2)
    whole = [{name: value for name, value in rank.items() if ".experts." not in name} for rank in digests]
    assert all(other == whole[0] for other in whole)


def assert_copies_are_equal(digests, pipeline):
    """A rank and the one with the same experts as far from the other end hold the same stages."""
    groups = [
        digests[first : first + len(digests) // pipeline] for first in range(0, len(digests), len(digests) // pipeline)
    ]
    for here, there in zip(groups, reversed(groups), strict=True):
        assert all(len(held) > 10 for held in here)
        assert here == there


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_steps_follow_one_process_in_every_layout_of_four_ranks(expected_curve):
    found = run_ranks(4, HERE, "learn_more", seconds=900)
    expected = {LAYERS: expected_curve, 4: _expected_curve(4)}
    for number, (schedule, pipeline, *_) in enumerate(LESS_USUAL):
        for result in found:
            assert worst(result[number]["curve"], expected[max(LAYERS, pipeline)]) < 1e-5, LESS_USUAL[number]
        if schedule == "dualpipe":
            assert_copies_are_equal([result[number]["digests"] for result in found], pipeline)
