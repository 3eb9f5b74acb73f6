"""Everything that the report may say, as plain frozen dataclasses.

The stage door fills them (`read.py` translates artifacts); the drawing code reads nothing else, so what is on the
page can be traced to a field here. Units are part of the names or stated beside them. `None` means "not measured" and
is shown as such, never as zero. Mappings keep the order in which they are given.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.pipeline.timeline import Span
from headrace.reporting.data_facts import Data

Point = tuple[float, float]
"""(training tokens seen so far, value)."""


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval; `low` and `high` are None where none was computed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Stage:
    """One box of the DAG, in the order in which stages run."""

    name: str
    fingerprint: str
    parents: tuple[str, ...]
    seconds: float | None
    made: str  # a few words: "4,096 merges", "2.9 M tokens in 8 shards"
    manifest_hash: str | None  # None while the stage is at work: the report's own
    inputs: Mapping[str, str]  # input name -> manifest hash
    folder: str


@dataclass(frozen=True)
class Schedule:
    """One quantity of the recipe over tokens, for example the learning rate."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class PlannedPhase:
    """Consecutive steps of the recipe under one name."""

    name: str
    steps: int
    tokens_before: int
    tokens: int
    sequences: tuple[int, int]  # of a step: the least and the most
    sequence_length: int
    learning_rate: tuple[float, float]  # of its first and of its last step
    yarn_factor: float | None  # of the rotary embedding from here on; None: as configured


@dataclass(frozen=True)
class Plan:
    """The recipe, resolved: its phases, and each quantity over tokens."""

    phases: tuple[PlannedPhase, ...]
    schedules: tuple[Schedule, ...]


@dataclass(frozen=True)
class ExpertLoad:
    """Share of tokens that each expert received; `layers[name][i][e]` belongs to `tokens[i]` and sums to 1 over e."""

    tokens: tuple[float, ...]
    layers: Mapping[str, tuple[tuple[float, ...], ...]]
    max_violation: tuple[Point, ...]  # MaxVio: (largest load - mean load) / mean load, arXiv 2408.15664


@dataclass(frozen=True)
class StepTimeline:
    """What each pipeline rank does in one step; times in seconds from its first action."""

    spans: tuple[Span, ...]
    idle: tuple[float, ...]  # by rank, 0..1
    collectives: tuple[Span, ...] = ()  # from issue to the end of the wait


@dataclass(frozen=True)
class PipelineStep:
    """One traced step of a run on several pipeline ranks, and what its schedule plans with the same durations."""

    step: int
    schedule: str
    reason: str  # why this schedule, in one sentence
    device: str
    pipeline: int  # ranks
    data: int
    expert: int
    dispatch: str  # what tokens travel by to experts on other ranks
    microbatches: int
    layers: tuple[int, ...]  # by pipeline stage
    live_activations: tuple[int, ...]  # by rank, at the peak: of one microbatch on one stage each
    receive_buffers: tuple[int, ...]  # by rank, at the peak
    planned: StepTimeline
    measured: StepTimeline


@dataclass(frozen=True)
class Training:
    """The pretrain stage: what was trained, how long it took and what was logged on the way."""

    parameters: int  # of the main model
    parameters_activated: int
    parameters_mtp: int  # of the multi-token-prediction module, apart from the main model's
    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float
    mfu: float | None  # model FLOPs over the GEMM peak measured at start, 0..1
    gemm_peak_flops: float | None  # FLOP/s
    loss_train: float  # nats per token, the mean of the last logged steps
    loss_train_steps: int  # how many they are, and their tokens
    loss_train_tokens: int
    loss_validation: float | None  # nats per token, at the end
    validation_rows: int  # what it was measured on, and the length of each in tokens
    validation_length: int
    skipped_steps: int  # steps whose loss or gradient was not finite
    curves: Mapping[str, tuple[Point, ...]]  # keys: CURVES
    plan: Plan
    expert_load: ExpertLoad | None
    formats: tuple[tuple[str, str], ...]  # what runs in which format
    pipeline_step: PipelineStep | None = None  # None: one pipeline rank


CURVES = ("train", "validation", "mtp", "gradient_norm", "tokens_per_second", "mfu")
"""The names of `Training.curves`: losses in nats per token, the norm before clipping, tokens/s, and MFU in 0..1."""


@dataclass(frozen=True)
class Baseline:
    """Another model on the same text; `difference`: ours minus this, paired by document; below 0 ours is better.

    `low` and `high`: its own interval over documents. A compressor of the whole text has neither pairs nor interval.
    """

    value: float
    difference: Estimate | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class BitsPerByte:
    """The model and its baselines on held-out text of one kind; `kind` is 'all' for everything together."""

    kind: str
    documents: int
    text_bytes: int
    model: Estimate
    baselines: Mapping[str, Baseline]  # 'unigram', 'bigram', 'trigram', 'xz -9', ...


@dataclass(frozen=True)
class Task:
    """One task of the harness. `chance` is what guessing scores, None where that has no meaning."""

    name: str
    metric: str
    higher_is_better: bool
    items: int
    shots: int
    score: Estimate
    chance: float | None
    measures: str  # a few words on what it tests


@dataclass(frozen=True)
class Agreement:
    """Two forms of the same model on the same tokens: absolute difference of log-probabilities, nats per token."""

    compared: str  # "in memory / reloaded checkpoint"
    tokens: int
    mean: float
    shift: Estimate  # the second's log-probability minus the first's: its mean, with an interval over rows
    largest: float
    identical: bool  # bit for bit
    limit: float | None  # the fail line for `largest`; None where nothing is required
    tied_rows: int  # rows set aside because two experts tied
    passed: bool


@dataclass(frozen=True)
class Sample:
    """Generated text, shown as it came out."""

    prompt: str
    continuation: str
    settings: str  # "greedy", "temperature 0.8"
    document: str  # where the prompt is from


@dataclass(frozen=True)
class Evaluation:
    """The evaluate stage."""

    bits_per_byte: tuple[BitsPerByte, ...]  # 'all' first
    tasks: tuple[Task, ...]
    agreement: tuple[Agreement, ...]
    samples: tuple[Sample, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)  # task -> why it was not run
    absent: tuple[str, ...] = ()  # what no task measures, and why


@dataclass(frozen=True)
class ComparedDifference:
    """A run minus the first on the same items; None where that cannot be given."""

    difference: Estimate
    p: float | None  # against no difference, by Holm over all of the comparison
    detectable: float | None  # the smallest true difference that would be found, with `Comparison.power`
    found: str | None  # "better" or "worse" than the first


@dataclass(frozen=True)
class ComparedRow:
    """One figure that all runs have."""

    task: str
    metric: str
    higher_is_better: bool
    items: int
    units: int  # independent ones: documents, passages or items
    values: Mapping[str, Estimate]  # by run
    differences: Mapping[str, ComparedDifference]  # by run, without the first


@dataclass(frozen=True)
class Comparison:
    """Finished evaluations side by side; the others are compared with the first."""

    first: str
    runs: Mapping[str, tuple[str, ...]]  # run -> the settings in which it differs from the first, which stands first
    rows: tuple[ComparedRow, ...]
    adjusted: str  # "Holm over 12 differences"
    power: float  # 0..1
    left_out: tuple[str, ...]  # figures that not all runs have on the same items, and why
    source: str  # the file behind it


@dataclass(frozen=True)
class StudyDifference:
    """Candidate against baseline by one measure, relative: the mean over pairs, and each pair; None: a run diverged."""

    measure: str
    mean: Estimate | None
    each: tuple[float | None, ...]


@dataclass(frozen=True)
class StudyAblation:
    """The candidate with one change against the first pair's baseline, relative; None past a divergence."""

    name: str
    second_half: float | None
    end: float | None
    validation: float | None
    diverged_at: int | None  # step
    points: tuple[Point, ...]


@dataclass(frozen=True)
class StudyRun:
    """One trained run of the precision study."""

    name: str
    format: str
    seeds: str
    validation_loss: float | None  # nats per token, at the end
    skipped_steps: int
    diverged_at: int | None
    seconds: float
    tokens_per_second: float
    where: str


@dataclass(frozen=True)
class PrecisionStudy:
    """The precision_study stage. Differences and spread are fractions of the baseline's loss."""

    baseline: str
    candidate: str
    pairs: int
    steps: int
    tokens: int  # of each run
    smoothing: float
    line: float
    verdict: str  # "within", "mean within", "beyond", "diverged"
    differences: tuple[StudyDifference, ...]  # the headline's first
    largest: float | None  # of the mean over pairs, over the second half
    spread: float | None  # over the baseline's seeds
    mean: tuple[Point, ...]
    band: tuple[tuple[float, float, float], ...]  # (tokens, low, high)
    each: tuple[tuple[Point, ...], ...]  # by pair
    ablations: tuple[StudyAblation, ...]
    runs: tuple[StudyRun, ...]
    formats: tuple[tuple[str, str, str], ...]  # what, its format in the baseline, its format in the candidate
    source: str  # the file behind the figures


@dataclass(frozen=True)
class Fault:
    """Something that ended an attempt to train."""

    step: int  # steps done before it
    rank: int
    cause: str  # killed, failed, lost or hung
    what: str


@dataclass(frozen=True)
class Reliability:
    """What the ledger of the training run tells; see `training/ledger.py` for how it is reckoned."""

    ettr: float | None  # 0..1: seconds of steps that lead to the final weights, over seconds at work
    goodput: float | None  # 0..1: tokens that reached the final weights, over tokens computed
    productive_seconds: float
    wall_seconds: float
    tokens_computed: int
    tokens_useful: int
    recovery: Mapping[str, float] | None  # mean seconds: detect, restart, load, replay, total; None: no fault
    attempts: int
    sittings: int  # processes of the stage
    restarts: int
    saves: int
    stall_seconds: float  # that training waited for saves
    remarkable: Mapping[str, int]  # skipped steps, spikes, rollbacks, corruptions, failed saves: how many
    slow_ranks: tuple[int, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Publication:
    """The converted model and where it went."""

    repository: str | None  # None: a local folder only
    commit: str | None
    tag: str | None
    folder: str
    format: str  # "BF16 safetensors, 2 shards"
    files: int
    size_bytes: int


@dataclass(frozen=True)
class Difference:
    """One configuration key that differs from its default; both sides as they are written in YAML."""

    key: str
    default: Any
    here: Any


@dataclass(frozen=True)
class ReportFacts:
    """All of it. `stages` and `config` are always there; what a run did not measure is None."""

    title: str
    command: str  # makes the same run again
    results_folder: str
    report_path: str
    finished: str | None  # a date in words, from the newest stage; never the time of drawing
    stages: tuple[Stage, ...]
    config: Mapping[str, Any]  # the whole tree, a mapping per group
    differences: tuple[Difference, ...]
    data: Data | None
    training: Training | None
    evaluation: Evaluation | None
    publication: Publication | None
    versions: Mapping[str, str]  # package -> version
    machine: Mapping[str, str]  # "processor", "memory", "operating system", ...
    code: Mapping[str, str]  # "commit", "work tree"
    study: PrecisionStudy | None = None  # None: this report was not asked to show one
    reliability: Reliability | None = None
    weights_from: str | None = None  # what training went on from
