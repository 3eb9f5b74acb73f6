"""Facts as a demo run would leave them: invented, but shaped like the real thing, and the same every time."""

import math
import random
from dataclasses import replace

import pytest

from headrace.config.compose import load
from headrace.config.recipe import BatchRampConfig
from headrace.pipeline.generators import generate
from headrace.pipeline.simulate import Costs, simulate
from headrace.pipeline.timeline import COMMUNICATION, Span, idle_shares
from headrace.reporting.facts import (
    Baseline,
    BitsPerByte,
    ComparedDifference,
    ComparedRow,
    Comparison,
    Difference,
    Estimate,
    Evaluation,
    ExpertLoad,
    PipelineStep,
    Plan,
    PrecisionStudy,
    Publication,
    ReportFacts,
    Sample,
    Stage,
    StepTimeline,
    StudyAblation,
    StudyDifference,
    StudyRun,
    Task,
    Training,
)
from headrace.reporting.recipe import facts_of, plan_of
from reporting.invented_data import AGREEMENT, HOSTILE, environment_data

STEPS, TOKENS_PER_STEP = 1464, 2048


@pytest.fixture(scope="session")
def demo_facts() -> ReportFacts:
    """Everything present."""
    return ReportFacts(
        title="nano on the environment corpus",
        command='snakemake --cores 2 --config experiment=demo set="recipe.learning_rate.peak=2e-3"',
        results_folder="/home/ada/headrace/results",
        report_path="/home/ada/headrace/results/report/5c8e0d9b7a61/artifact/report.html",
        finished="2026-11-24 14:02 UTC",
        stages=_stages(),
        config=_config(),
        differences=(
            Difference("recipe.learning_rate.peak", 0.003, 0.002),
            Difference("train.from", None, "0f3b6a1c9d2e@1400"),
            Difference("evaluate.tasks", ["humaneval_likelihood", "reasoning_gym"], ["humaneval_likelihood"]),
        ),
        data=environment_data(),
        training=_training(),
        evaluation=_evaluation(),
        publication=Publication(
            None,
            None,
            "pretrain-7d41c02e93ab",
            "/home/ada/headrace/results/publish/e1f7a24c8b90/artifact/repository",
            "BF16 safetensors in 1 shard",
            9,
            15_482_336,
        ),
        versions={
            "headrace": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "snakemake": "9.27.1",
        },
        machine={"processor": "AMD EPYC 7R13, 2 cores", "memory": "7.6 GiB", "operating system": "Linux 6.1"},
        code={"commit": "3f9d0f1c22a7be0d4fb2f70b1a4b6f5d6e9c8a10", "work tree": "clean"},
    )


def _hex(name: str, length: int) -> str:
    return "".join(random.Random(name).choices("0123456789abcdef", k=length))


def _stages() -> tuple[Stage, ...]:
    table = (
        ("corpus", (), 9.4, "5,214 documents, 41.2 MB of text"),
        ("tokenizer", ("corpus",), 6.2, "4,096 entries, 3,834 merges"),
        ("tokenize", ("corpus", "tokenizer"), 4.1, "11.9 M tokens in 8 shards"),
        ("pretrain", ("tokenize",), 291.0, "7.71 M parameters, 3.00 M tokens"),
        ("convert", ("tokenizer", "pretrain"), 1.3, "BF16 safetensors, 15.5 MB"),
        ("evaluate", ("corpus", "tokenize", "pretrain", "convert"), 74.0, "4 kinds of text, 2 tasks, 6 samples"),
        ("publish", ("convert", "evaluate"), 0.7, "9 files in a local folder"),
        (
            "report",
            ("corpus", "tokenizer", "tokenize", "pretrain", "convert", "evaluate", "publish"),
            None,
            "this page",
        ),
    )
    return tuple(
        Stage(
            name,
            _hex(name, 12),
            parents,
            seconds,
            made,
            None if name == "report" else _hex(name + "m", 64),
            {p: _hex(p + "m", 64) for p in parents},
            f"/home/ada/headrace/results/{name}/{_hex(name, 12)}/artifact",
        )
        for name, parents, seconds, made in table
    )


def _config() -> dict[str, object]:
    return {
        "seed": {"init": 1, "data": 1},
        "model": {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "n_routed_experts": 16,
            "rope_scaling": None,
            "initializer_range": "auto",
        },
        "recipe": {
            "tokens": 3_000_000,
            "learning_rate": {"peak": 0.002, "warmup_steps": 50, "cosine": "40%", "tail": []},
        },
        "evaluate": {"tasks": ["humaneval_likelihood"], "items": 200},
        "publish": {"repo_id": None, "title": "Ein Mühlrad – 水車"},
    }


def _training() -> Training:
    noise = random.Random(7)
    steps = range(0, STEPS, 2)
    loss = [
        (s * TOKENS_PER_STEP, 4.42 + 3.9 * math.exp(-s / 170) - 0.25 * s / STEPS + noise.gauss(0, 0.09)) for s in steps
    ]
    mtp = [(x, y * 0.98 + 0.62 * (1 - math.exp(-x / 4e5)) + noise.gauss(0, 0.04)) for x, y in loss]
    validation = [
        (s * TOKENS_PER_STEP, 4.45 + 3.9 * math.exp(-s / 170) - 0.24 * s / STEPS) for s in range(60, STEPS, 100)
    ]
    gradient = [
        (x, 0.5 + 4 * math.exp(-x / 9e4) + abs(noise.gauss(0, 0.12)) + (6.0 if x == 1_499_136 else 0)) for x, _ in loss
    ]
    speed = [(x, 10_300 + noise.gauss(0, 220) - (3800 if x < 5000 else 0)) for x, _ in loss]
    return Training(
        parameters=7_712_064,
        parameters_activated=3_104_256,
        parameters_mtp=912_384,
        tokens=STEPS * TOKENS_PER_STEP,
        steps=STEPS,
        seconds=291.0,
        tokens_per_second=10_303.2,
        mfu=0.413,
        gemm_peak_flops=187.4e9,
        loss_train=4.162,
        loss_train_steps=10,
        loss_train_tokens=20_480,
        loss_validation=4.217,
        validation_rows=64,
        validation_length=512,
        skipped_steps=0,
        curves={
            "train": tuple(loss),
            "validation": tuple(validation),
            "mtp": tuple(mtp),
            "gradient_norm": tuple(gradient),
            "tokens_per_second": tuple(speed),
            "mfu": tuple((x, y * 4.01e-5) for x, y in speed),
        },
        plan=_plan(),
        expert_load=_load(),
        formats=(("linear layers and experts", "E4M3, accumulated in FP32"), ("router", "FP32")),
    )


def _plan() -> Plan:
    """The demo's own length and budget, with a ramp and an extension."""
    extension = load(["recipe=v3_671b"]).recipe.extensions[0]
    recipe = replace(
        load(["recipe=demo"]).recipe,
        batch_ramp=BatchRampConfig(4, "3%", "linear", 4),
        extensions=(replace(extension, name="context_2x", steps=20, sequence_length=512, batch_sequences=4),),
    )
    return facts_of(plan_of(recipe))


def _load() -> ExpertLoad:
    noise = random.Random(11)
    moments = tuple(float(s * TOKENS_PER_STEP) for s in range(0, STEPS, 12))
    layers = {}
    for layer in (1, 2, 3, 4):
        taste = [noise.gauss(0, 0.9) for _ in range(16)]
        rows = []
        for i in range(len(moments)):
            skew = 0.12 + math.exp(-i / 14)
            raw = [math.exp(skew * taste[e] + noise.gauss(0, 0.07)) for e in range(16)]
            rows.append(tuple(value / sum(raw) for value in raw))
        layers["layer 4 (MTP)" if layer == 4 else f"layer {layer}"] = tuple(rows)
    worst = [max(max(rows[i]) * 16 - 1 for rows in layers.values()) for i in range(len(moments))]
    return ExpertLoad(moments, layers, tuple(zip(moments, worst, strict=True)))


def _evaluation() -> Evaluation:
    def score(kind: str, documents: int, size: int, value: float, spread: float, *others: float) -> BitsPerByte:
        names = ("unigram", "bigram", "trigram", "xz -9")
        baselines = {
            name: Baseline(other, _paired(name, value - other), *_own(name, other))
            for name, other in zip(names, others, strict=True)
        }
        return BitsPerByte(kind, documents, size, Estimate(value, value - spread, value + spread * 1.07), baselines)

    def _paired(name: str, gap: float) -> Estimate | None:
        """xz compresses in one piece and has no value per document."""
        return None if name == "xz -9" else Estimate(gap, gap - 0.04, gap + 0.042)

    def _own(name: str, value: float) -> tuple[float | None, float | None]:
        return (None, None) if name == "xz -9" else (value - 0.07, value + 0.08)

    return Evaluation(
        bits_per_byte=(
            score("all", 212, 1_402_331, 2.104, 0.048, 3.611, 2.398, 2.141, 1.953),
            score("code", 148, 1_011_480, 1.987, 0.055, 3.702, 2.322, 2.031, 1.842),
            score("documentation", 51, 322_904, 2.377, 0.088, 3.355, 2.571, 2.399, 2.207),
            score("data", 13, 67_947, 2.541, 0.214, 3.490, 2.702, 2.688, 2.305),
        ),
        tasks=(
            Task(
                "humaneval_likelihood",
                "bits per byte",
                False,
                164,
                0,
                Estimate(2.611, 2.542, 2.683),
                None,
                "canonical solutions of HumanEval",
            ),
            Task(
                "leg_counting",
                "accuracy",
                True,
                200,
                0,
                Estimate(0.265, 0.209, 0.330),
                0.25,
                "arithmetic over a list of animals",
            ),
            Task(
                "letter_choice",
                "accuracy",
                True,
                200,
                0,
                Estimate(0.310, 0.250, 0.377),
                0.25,
                "picking one of four answers",
            ),
        ),
        agreement=AGREEMENT,
        samples=(
            Sample(
                "def read_config(path):\n    ",
                "with open(path) as file:\n        return json.load(file)\n\ndef main(self):\n    # Return the",
                "greedy",
                "stdlib/configparser.py",
            ),
            Sample(
                "The purpose of this module is to ",
                f"make the {HOSTILE} of the name",
                "temperature 0.8",
                "packages/attrs/README.md",
            ),
        ),
        skipped={"humaneval": "it runs code that the model writes, and there is no sandbox here"},
        absent=("CMath: not in the harness",),
    )


@pytest.fixture(scope="session")
def demo_comparison() -> Comparison:
    """This run, its twin with another learning rate and a dense one, by two metrics."""
    ours, twin, dense = _hex("evaluate", 12), _hex("twin", 12), _hex("dense", 12)

    def row(task: str, metric: str, higher: bool, gaps: tuple[float, float]) -> ComparedRow:
        estimates = [Estimate(2.1 + gap, 2.06 + gap, 2.15 + gap) for gap in (0.0, *gaps)]
        differences = [
            ComparedDifference(Estimate(gap, gap - 0.02, gap + 0.021), 0.0004 if abs(gap) > 0.03 else 0.41, 0.029,
                               ("better" if (gap > 0) == higher else "worse") if abs(gap) > 0.03 else None)
            for gap in gaps
        ]  # fmt: skip
        names = (ours, twin, dense)
        return ComparedRow(task, metric, higher, 212, 180, dict(zip(names, estimates, strict=True)),
                           dict(zip(names[1:], differences, strict=True)))  # fmt: skip

    return Comparison(
        first=ours,
        runs={ours: (), twin: ("recipe.learning_rate.peak=0.001",), dense: ("model.n_routed_experts=0",)},
        rows=(
            row("bits_per_byte", "bits per byte", False, (-0.012, 0.094)),
            row("bits_per_byte, documentation", "bits per byte", False, (0.004, 0.131)),
            row("leg_counting", "accuracy", True, (0.01, -0.06)),
        ),
        adjusted="Holm over 6 differences",
        power=0.8,
        left_out=(f"letter_choice: accuracy: not in {dense}",),
        source="compare/0a1b2c3d4e5f/compare.json",
    )


WHERE = "cpu, <b>2</b> threads"
TOKENS = [float(2048 * step) for step in range(1, 401)]


def wandering(seed: int, ends_at: float) -> tuple[tuple[float, float], ...]:
    noise, value, points = random.Random(seed), 0.0, []
    for i, x in enumerate(TOKENS):
        value = 0.9 * value + noise.gauss(0, 2e-4)
        points.append((x, value + ends_at * i / 400))
    return tuple(points)


@pytest.fixture(scope="session")
def demo_study() -> PrecisionStudy:
    """A study as it might be: three pairs, three ablations of which one diverged."""
    each = tuple(wandering(seed, end) for seed, end in enumerate((0.0009, 0.0004, -0.0002)))
    mean = tuple((x, sum(curve[i][1] for curve in each) / 3) for i, x in enumerate(TOKENS))
    return PrecisionStudy(
        baseline="BF16",
        candidate="FP8",
        pairs=3,
        steps=400,
        tokens=819_200,
        smoothing=0.9,
        line=0.0025,
        verdict="within",
        differences=(
            StudyDifference("training loss, second half", Estimate(0.0005, -0.0004, 0.0014), (0.0009, 0.0004, 0.0002)),
            StudyDifference("training loss, last step", Estimate(0.0012, -0.0019, 0.0043), (0.0031, 0.0004, 0.0001)),
            StudyDifference("validation loss, end", None, (0.0009, None, 0.0002)),
        ),
        largest=0.0017,
        spread=0.006,
        mean=mean,
        band=tuple((x, y - 0.0011, y + 0.0011) for x, y in mean),
        each=each,
        ablations=(
            StudyAblation("no_promotion", 0.0041, 0.005, 0.0047, None, wandering(7, 0.005)),
            StudyAblation("per_tensor", 0.0012, 0.0008, 0.001, None, wandering(8, 0.001)),
            StudyAblation("block_gradients", None, None, None, 301, wandering(9, 0.02)[:300]),
        ),
        runs=tuple(
            StudyRun(f"pair-{pair}-{role}", name, f"init {pair}, data {pair}", 4.2, 0, None, 130.0, 6_302.0, WHERE)
            for pair in range(3)
            for role, name in (("baseline", "BF16"), ("candidate", "FP8"))
        ),
        formats=(("linear layers", "BF16", "E4M3"), ("router", "FP32", "FP32")),
        source="precision_study/0123456789ab/artifact/study.json",
    )


@pytest.fixture(scope="session")
def demo_step() -> PipelineStep:
    """DualPipe on 4 ranks with expert parallelism: the plan, and the same with everything later and slower."""
    simulation = simulate(generate("dualpipe", 4, 8), Costs(0.01, 0.02, 0.01, 0.01))
    late = tuple(
        Span(s.rank, 1.2 * s.start, 1.2 * s.start + 1.1 * (s.end - s.start), s.action) for s in simulation.spans
    )
    collectives = tuple(Span(s.rank, s.start + 0.001, s.start + 0.008, "dispatch", COMMUNICATION) for s in late)

    def timeline(spans: tuple[Span, ...], *collectives: Span) -> StepTimeline:
        return StepTimeline(spans, tuple(idle_shares(spans).values()), collectives)

    return PipelineStep(
        step=3,
        schedule="dualpipe",
        reason="it hides the communication of a forward under a backward, and the other way round.",
        device="cpu",
        pipeline=4,
        data=2,
        expert=2,
        dispatch="deepep 1.2.1",
        microbatches=8,
        layers=(1, 2, 0, 1),
        live_activations=simulation.live_activations,
        receive_buffers=simulation.receive_buffers,
        planned=timeline(simulation.spans),
        measured=timeline(late, *collectives),
    )
