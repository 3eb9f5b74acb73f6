"""What a model card says, as plain values; the stage that publishes fills them in from artifacts, never by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataSource:
    """Where training text came from, and under which licence."""

    name: str
    licence: str  # an SPDX expression, as the source declares it
    documents: int
    bytes: int


@dataclass(frozen=True)
class Measurement:
    """One evaluated number with its 95 % interval, and the same number of what it is compared with."""

    task: str  # "Bits per byte, Python code"
    dataset: str  # name of the data, for people
    dataset_id: str | None  # the data set's repository on the Hub, where it has one
    metric: str  # "bits_per_byte"
    value: float
    low: float | None
    high: float | None
    items: int  # documents or questions
    baselines: Mapping[str, float]  # "bigram": 2.31; names are columns of the card's table


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card, its metadata and `.eval_results/` are made from."""

    title: str
    license: str  # an SPDX identifier, or 'other'
    repo_id: str | None
    fingerprint: str  # of the publish stage; the tag under which the repository is found again
    config: Mapping[str, Any]  # the model's, in the keys of config.json
    parameters: int  # all of them
    parameters_activated: int  # used for one token
    parameters_mtp: int  # of `parameters`, in the multi-token-prediction module
    tokens: int  # seen in training
    sequence_lengths: Sequence[int]  # of training rows, in the order of training
    flops: float  # of the whole training
    seconds: float  # of the whole training
    hardware: str
    precision: str  # of training
    dtype: str  # of the published weights: fp8, bf16 or fp32
    weight_bytes: int  # of the published weights
    cuts_blocks: bool  # whether they are FP8 with blocks that transformers cannot dequantise
    optimizer: str
    sources: Sequence[DataSource]
    measurements: Sequence[Measurement]
    versions: Mapping[str, str]
    code_version: str
    command: str  # reproduces the model
    languages: Sequence[str] = ()  # ISO 639-1, or "code"
    tags: Sequence[str] = ()
    origin: str | None = None  # what training went on from: owner/name@commit, or a folder's or run's name
    limits: Sequence[str] = ()  # what else to know before use, one sentence each
