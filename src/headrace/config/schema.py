"""The configuration's schema: one frozen dataclass per Hydra group, no default values.

The values live in `conf/`, one commented YAML per choice; a key that the YAML lacks is an error, never a default.
Groups up to `publish` change a result and are hashed into fingerprints; the last five are the machine and never are.
Keys of `ModelConfig` are those of DeepSeek-V3's `config.json` on the Hub. This module checks types and ranges of single
values; conditions across fields are in `checks.py`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from headrace.config.recipe import RecipeConfig, RopeScaling
from headrace.config.values import (
    CLOSED,
    Count,
    Fraction,
    OfflineTask,
    Positive,
    PositiveFloat,
    ScaleFormat,
    Schedules,
    Share,
)


@dataclass(frozen=True)
class SeedConfig:
    """Seeds: `init` draws the weights, `data` orders the rows."""

    __pydantic_config__ = CLOSED
    init: Count
    data: Count


@dataclass(frozen=True)
class SourceConfig:
    """One named source of text: what mixture weights and shard folders call by this name."""

    __pydantic_config__ = CLOSED
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]  # a folder's name and a key of the mixture
    paths: tuple[str, ...]  # files, folders, globs; hf://datasets/..., s3://, gs://; datasets:// (corpus/hub_stream.py)
    text_field: str  # the field that holds the text in JSONL and Parquet
    validation_fraction: Fraction | None = None  # of this source's text; null: as the corpus has it
    heldout_fraction: Fraction | None = None


@dataclass(frozen=True)
class NearDuplicatesConfig:
    """MinHash over word shingles, 14 bands of 8 (as FineWeb has them), with rensa."""

    __pydantic_config__ = CLOSED
    threshold: Share  # estimated Jaccard similarity from which the later document is dropped
    shingle_words: Positive  # words in a shingle


@dataclass(frozen=True)
class ItemsFile:
    """Evaluation items as `headrace items` writes them, and the hash that it prints: a path alone names no content."""

    __pydantic_config__ = CLOSED
    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from and how it is split into train, validation and held-out documents."""

    __pydantic_config__ = CLOSED
    source: Literal["environment", "files"]
    paths: tuple[str, ...]  # source=files: the short form of one source, named `files`
    sources: tuple[SourceConfig, ...]  # source=files: named sources, instead of paths
    packages: bool  # source=environment: installed packages beside the standard library
    licences: tuple[str, ...]  # source=environment: SPDX identifiers that a package must declare
    text_field: str  # the field that holds the text in the JSONL and Parquet of `paths`
    max_damaged_fraction: Fraction  # share of a source's documents that may be damaged; above it the run stops
    min_document_bytes: Count
    max_document_bytes: Positive
    quality_filters: tuple[Literal["gopher_quality", "gopher_repetition", "fineweb_quality"], ...]  # datatrove's
    near_duplicates: NearDuplicatesConfig | None
    contamination_tasks: tuple[OfflineTask, ...]  # whose items must not be in training text
    contamination_items: ItemsFile | None  # items of any other tasks
    max_bytes: Positive | None  # a deterministic sample of at most so many bytes of text; null takes all
    validation_fraction: Share
    heldout_fraction: Share
    sample_bytes: Positive  # training text put aside for learning a tokenizer

    def fractions_of(self, source: SourceConfig | None) -> tuple[float, float]:
        """(validation, held-out) of a named source's text; None: of text without a named source."""
        validation, heldout = (source.validation_fraction, source.heldout_fraction) if source else (None, None)
        return (
            self.validation_fraction if validation is None else validation,
            self.heldout_fraction if heldout is None else heldout,
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE with V3's pretokeniser, trained here or read from a tokenizer.json."""

    __pydantic_config__ = CLOSED
    source: Literal["train", "file"]
    path: str | None  # source=file: the tokenizer.json
    vocab_size: Annotated[int, Field(ge=264)]  # 256 bytes and the control tokens are always there
    sample_bytes: Positive  # source=train: how much training text the merges are learnt from


@dataclass(frozen=True)
class TokensConfig:
    """Text to token shards."""

    __pydantic_config__ = CLOSED
    engine: Literal["auto", "fastokens", "tokenizers"]
    total: Positive | None  # tokens that the corpus will have, about; for shards=auto and `headrace plan`
    shards: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"]  # of the training split; auto: of 2^31 tokens
    fim_rate: Fraction  # share of training documents that are rearranged to fill in their middle
    split_rate: Fraction  # share of tokens that join punctuation and line ends which are written as two
    parity_every: (
        Positive  # every n-th document, 32 of a shard at least, is encoded again with `tokenizers` and compared
    )
    row_lengths: Annotated[tuple[Positive, ...], Field(min_length=1)]  # documents are packed for the first


@dataclass(frozen=True)
class ModelConfig:
    """The V3 network, in the keys of the Hub's config.json (report: arXiv 2412.19437, section 4.2)."""

    __pydantic_config__ = CLOSED
    vocab_size: Positive  # rows of embedding and head
    hidden_size: Positive  # d
    intermediate_size: Positive  # dense feed-forward
    moe_intermediate_size: Positive  # each routed expert, and each shared expert
    num_hidden_layers: Positive
    num_attention_heads: Positive  # n_h
    n_shared_experts: Positive
    n_routed_experts: Positive  # N_r
    num_experts_per_tok: Positive  # K_r
    n_group: Positive
    topk_group: Positive
    norm_topk_prob: bool
    routed_scaling_factor: PositiveFloat
    first_k_dense_replace: Count
    q_lora_rank: Positive | None  # d_c'; null projects queries directly
    kv_lora_rank: Positive  # d_c
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=1)]  # D, the MTP depth
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rope_scaling: RopeScaling | None
    max_position_embeddings: Positive
    initializer_range: PositiveFloat | Literal["auto"]  # auto: 0.006 at width 7168, 0.006*sqrt(7168/d) below


@dataclass(frozen=True)
class Fp8Config:
    """FP8 matrix multiplications (report, section 3.3): tiles, scales, accumulation, caches. Values are E4M3."""

    __pydantic_config__ = CLOSED
    backend: Literal["auto", "reference", "triton", "scaled_mm", "gluon", "deep_gemm"]
    activation_tile: Literal["1x128", "tensor"]  # what shares a scale in activations
    gradient_tile: Literal["1x128", "128x128", "tensor"]  # and in gradients of activations; 128x1 for weight gradients
    weight_tile: Literal["128x128", "tensor"]
    scales: ScaleFormat  # of activations, gradients and weights where nothing else is said
    dispatched_scales: ScaleFormat  # of what is sent to experts, and of gradients before their down projection
    dispatched_gradients: Literal["e4m3", "compute"]  # gradients on their way to experts
    transposed_scales: ScaleFormat  # of 128x1 tiles made from cached 1x128 ones
    attention_output_cache: Literal["e5m6", "e4m3", "bf16"]  # kept input of the projection after attention
    swiglu_input_cache: Literal["e4m3", "bf16"]  # gate and up projection, kept for the backward pass
    mtp_projection: Literal["compute", "fp8"]  # eh_proj; the released checkpoint keeps it in BF16
    accumulation: Literal["fp32", "hopper"]  # hopper: 14-bit accumulators, emulated (back end reference only)
    promotion: bool  # accumulation=hopper: partial sums go to FP32 every 128 elements


@dataclass(frozen=True)
class RecomputeConfig:
    """What the backward pass computes again instead of keeping (report, section 3.2.3)."""

    __pydantic_config__ = CLOSED
    norms: bool  # outputs of RMSNorm
    up_projections: bool  # queries, keys and values of MLA
    swiglu: bool  # output of SwiGLU


@dataclass(frozen=True)
class PrecisionConfig:
    """What runs in which format. Master weights and gradients are always FP32, as is the router."""

    __pydantic_config__ = CLOSED
    compute: Literal["fp32", "bf16"]  # activations, and matrix multiplications that are not in FP8
    fp8: Fp8Config | None  # null: no FP8
    recompute: RecomputeConfig
    optimizer_moments: Literal["fp32", "bf16"]


@dataclass(frozen=True)
class SpikeConfig:
    """A loss far above the recent ones, and what is done about it."""

    __pydantic_config__ = CLOSED
    policy: Literal["go_on", "skip", "rollback"]
    factor: Annotated[float, Field(gt=1)]  # a spike is a loss above so many times the mean of the last `window`
    window: Positive  # steps; none is a spike before so many


@dataclass(frozen=True)
class TrainConfig:
    """What one training run starts from and watches."""

    __pydantic_config__ = CLOSED
    from_: Annotated[str | None, Field(alias="from", pattern=r"^[0-9a-f]{12}@[0-9]+$")]  # <run or import>@<step>
    mask_documents: bool  # documents packed into one row do not see each other
    validate_every: Positive  # steps between two measurements of the validation loss
    validation_rows: Positive
    rollback_after: Positive  # steps in a row without a finite loss and gradient, none of them applied
    loss_spike: SpikeConfig


@dataclass(frozen=True)
class ConvertConfig:
    """Training checkpoint to Hub folder."""

    __pydantic_config__ = CLOSED
    dtype: Literal["fp8", "bf16", "fp32"]
    unaligned: Literal["deepseek", "bf16"]  # dtype=fp8: matrices that are no multiples of 128
    step: Positive | None  # which kept checkpoint; null takes the last
    weights: Literal["final", "ema"]  # the weights, or their moving average (recipe.ema_decay)
    max_shard_bytes: Positive


@dataclass(frozen=True)
class StudyConfig:
    """precision_study: FP8 against BF16 with paired seeds, and ablations (report, section 3.3 and appendix B)."""

    __pydantic_config__ = CLOSED
    baseline: PrecisionConfig
    candidate: PrecisionConfig  # differs from the baseline by its FP8
    pairs: Annotated[int, Field(ge=2)]  # seeds; each trains baseline and candidate
    tokens: Positive  # budget of each run
    ablations: tuple[Literal["no_promotion", "per_tensor", "block_gradients"], ...]  # changes to the candidate
    smoothing: Fraction  # of the exponential moving average over loss curves
    in_report: bool  # the report waits for the study and shows it


@dataclass(frozen=True)
class HarnessTask:
    """A task or group of the lm-evaluation-harness, whose data come from the Hub."""

    __pydantic_config__ = CLOSED
    task: Annotated[str, Field(pattern=r"^[\w-]+$")]  # the harness's name
    folders: tuple[Annotated[str, Field(pattern=r"^[\w-]+(/[\w-]+)*$")], ...]  # of lm_eval/tasks that define it
    metric: Annotated[str, Field(pattern=r"^\w+(,[\w-]+)?$")]  # the main one; gold: bits per byte of right answers
    shots: Count | None  # null: as the harness defines the task
    passage: str | None  # the field of an item that items of one passage share; null: items are independent
    definition: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # sha256 of the files in those folders
    items: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None  # sha256 of its items and prompts; null: any


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the converted model."""

    __pydantic_config__ = CLOSED
    tasks: tuple[OfflineTask, ...]  # those that need no network
    harness: tuple[HarnessTask, ...]  # those that do
    without_network: Literal["refuse", "skip"]  # `harness` where the Hub cannot be reached
    absent: tuple[str, ...]  # what the results say was not measured, and why
    items: Positive  # items per task at most
    heldout_rows: Positive  # rows of held-out text for bits per byte
    bootstrap: Positive  # resamples of documents
    samples: Count  # generated texts
    sample_tokens: Positive  # length of each


@dataclass(frozen=True)
class PublishConfig:
    """What is published, and where."""

    __pydantic_config__ = CLOSED
    push: bool  # the go-ahead for all that is named below; false builds and lists it
    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None  # model repository
    private: bool
    kernels: Annotated[str, Field(pattern=r"^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$", max_length=96)] | None
    dataset: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None  # data set repository for the tokens
    dataset_view: Literal["arrow", "megatron"]
    cache: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None  # data set repository for the run's artifacts
    checkpoints: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None  # bucket for the kept checkpoints
    license: str  # an SPDX identifier or 'other', for the model card
    title: str
    allow_dirty: bool  # push what code with uncommitted changes, or of an unknown commit, has made


@dataclass(frozen=True)
class PhaseLayoutConfig:
    """What is different in one phase of the recipe; null is as elsewhere. World stays pipeline x data."""

    __pydantic_config__ = CLOSED
    phase: str  # ramp, main, or the name of a context extension
    pipeline: Positive | None
    expert: Positive | None
    data: Positive | None
    schedule: Schedules | None
    layers: tuple[Count, ...] | None
    microbatch: Positive | None


@dataclass(frozen=True)
class ParallelConfig:
    """The layout: world = pipeline x data. Never hashed: it does not change what is computed."""

    __pydantic_config__ = CLOSED
    pipeline: Positive
    expert: Positive
    data: Positive
    node_size: Positive  # ranks of one node, between which sending is cheap
    schedule: Schedules
    layers: tuple[Count, ...] | None  # layers of each pipeline stage; null splits evenly
    dispatch: Literal["all_to_all", "deepep"]  # how tokens travel to experts on other ranks
    microbatch: Positive | None  # sequences per forward pass; null takes a rank's whole share of the step's batch
    phases: tuple[PhaseLayoutConfig, ...]  # phases of the recipe that are laid out differently


@dataclass(frozen=True)
class LaunchConfig:
    """How a stage is started on this machine."""

    __pydantic_config__ = CLOSED
    device: Literal["cpu", "cuda", "auto"]
    threads: Positive | None  # CPU threads of one process; null shares all cores among the ranks of this machine
    start: Literal["local", "srun", "torchrun"]  # how the ranks of a layout with more than one are started
    hang_seconds: PositiveFloat  # a rank without a sign of life for so long ends the run
    minutes: PositiveFloat | None  # time budget of one job; the stage saves and exits 75 before it ends
    verify_every: Count  # steps between two searches for silent corruption of weights and moments; 0 never searches
    recompute_every: Count  # one random step in so many is computed twice and compared; 0 never
    pieces_per_job: Positive  # so many pieces of the corpus (of about 32 MB) are scanned by one job
    shards_per_job: Positive  # so many token shards are made by one job
    rerun: Literal["loop", "slurm"]  # what exit 75 leads to: run again at once, or `scontrol requeue`
    fetch: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None  # cache of stages to take finished ones from


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is saved and what is kept."""

    __pydantic_config__ = CLOSED
    interval: Positive | Literal["auto"]  # steps between two saves; auto: from measured times and `faults_per_day`
    faults_per_day: PositiveFloat  # of one machine, for interval=auto
    asynchronous: bool  # training goes on while a copy of its state is written
    accept_other: bool  # go on from a checkpoint of another configuration, data or stage version
    keep: Positive  # the newest so many, and what checks and policies may have to go back to
    keep_every: Positive | None  # and each step that this divides, for good


@dataclass(frozen=True)
class TrackingConfig:
    """The tracked run of a stage: JSONL always, Weights & Biases or trackio beside it."""

    __pydantic_config__ = CLOSED
    wandb: Literal["offline", "online", "disabled"]
    backend: Literal["wandb", "trackio"]
    project: str
    entity: str | None
    log_every: Positive  # steps
    log_level: Literal["debug", "info", "warning"]


@dataclass(frozen=True)
class PathsConfig:
    """Where results lie."""

    __pydantic_config__ = CLOSED
    results: str


@dataclass(frozen=True)
class Config:
    """The whole tree, as `conf/config.yaml` composes it."""

    __pydantic_config__ = CLOSED
    seed: SeedConfig
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    tokens: TokensConfig
    model: ModelConfig
    precision: PrecisionConfig
    recipe: RecipeConfig
    train: TrainConfig
    study: StudyConfig
    convert: ConvertConfig
    evaluate: EvaluateConfig
    publish: PublishConfig
    parallel: ParallelConfig
    launch: LaunchConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    paths: PathsConfig
