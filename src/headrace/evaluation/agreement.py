"""One model in three forms: in memory when training ended, reloaded from the checkpoint, exported to the Hub.

Two comparisons have a fail line, each per token on the same held-out rows, in nats:

- in memory against reloaded, the same code at the same precision: equal bit for bit, or within 1e-6, since a matrix
  product split over another number of threads may sum in another order;
- reloaded and rounded to the export's dtype, run by our model in FP32, against the export run by transformers in FP32:
  within 1e-4. Different code, same numbers: what remains is FP32 rounding. FP8 is no exception, its line is the same:
  our weights are the checkpoint's, quantised and dequantised by `conversion.check` in numpy; the export's are its own
  codes times its own scales.

Routing is discontinuous: where two experts' scores are equal to within FP32 rounding, two exact implementations may
choose differently, and that token and those after it in the row differ by more than rounding. Such rows are
recognised, not waved through: the transformers router must show a gap between chosen and refused scores below 1e-6 at
or before the first token that differs. They are counted in the result, and more than a quarter of the rows is a
failure whatever the reason.

Before that, every exported weight is compared with the checkpoint bit by bit (`conversion.check`). A third comparison,
in memory at training precision against the export, is printed without a line: it is what rounding to BF16 or FP8 costs,
and for a model trained in FP8 the rounding of activations that FP32 evaluation leaves out. Its `shift`, the mean change
of a token's log-probability, comes with a 95 % interval over rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.artifacts.tensors import load_tensors
from headrace.config.schema import ModelConfig
from headrace.conversion.check import expected_values, verify_export
from headrace.errors import UserError
from headrace.evaluation.scorer import Scorer, TransformerScorer, TransformersScorer
from headrace.evaluation.statistics import clustered_mean
from headrace.fp8.gemms import Compute
from headrace.fp8.numerics import Numerics

RELOAD_LINE = 1e-6
EXPORT_LINE = 1e-4
TIE = 1e-6
MAX_TIED_ROWS = 0.25


class DisagreementError(Exception):
    """Two forms of one model give different answers: a fault of storage, of conversion or of ours, not the user's."""


@dataclass(frozen=True)
class Comparison:
    """Per-token differences of two forms in nats; `line` is None where nothing is required."""

    compared: str
    tokens: int
    mean: float
    shift: dict[str, Any]  # second - first, with its sign and an interval over rows
    largest: float  # outside rows with a router tie
    identical: bool  # bit for bit
    line: float | None
    tied_rows: int
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(vars(self))


def measure(
    agreement_file: Path,
    checkpoint: Path,
    hub_folder: Path,
    config: ModelConfig,
    numerics: Numerics | Compute,
    dtype: str,
    exported: TransformersScorer,
    final: bool = True,
    device: str = "cpu",
    kind: str = "model",
) -> dict[str, Any]:
    """Compare the three forms.

    agreement_file: `tokens` int64 [R, T + 1] and `log_probabilities` float32 [R, T], computed row by row by the model
    in memory at the end of training; numerics: of training; checkpoint, kind: what was exported, as for `export`;
    final: whether it is the weights at that end. An earlier step and the moving average have nothing in memory to be
    compared with: the first and third comparison are left out. dtype: of the export, bf16, fp8 or fp32.
    Returns comparisons, fail lines and `passed`. Raises `UserError` where a file is malformed or a weight differs.
    """
    elements = verify_export(hub_folder, checkpoint, config, kind)
    tokens, in_memory = _read(agreement_file)
    values = expected_values(hub_folder, checkpoint, kind)
    rounded = TransformerScorer.of(values, checkpoint, config, "fp32", device)
    with _router_gaps(exported.model) as gaps:
        export = _by_row(exported, tokens)
    comparisons = [
        _compare(
            f"reloaded, rounded to {dtype}, FP32 / exported, FP32",
            _by_row(rounded, tokens),
            export,
            EXPORT_LINE,
            torch.stack(gaps).view(len(tokens), -1, tokens.shape[1] - 1).amin(1) if gaps else None,
        )
    ]
    if final:
        reloaded = TransformerScorer.load(checkpoint, config, numerics, device, kind)
        comparisons.insert(
            0, _compare("in memory / reloaded checkpoint", in_memory, _by_row(reloaded, tokens), RELOAD_LINE)
        )
        comparisons.append(
            _compare(f"in memory ({Numerics.of(numerics).name}) / exported, FP32", in_memory, export, None)
        )
    return {
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "weights_compared": elements,
        "router_tie": TIE,
        "passed": all(comparison.passed for comparison in comparisons),
    }


def require(result: dict[str, Any]) -> None:
    """Raise `DisagreementError` naming the first comparison of `measure`'s result that is over its line."""
    for entry in result["comparisons"]:
        if not entry["passed"]:
            raise DisagreementError(
                f"agreement: {entry['compared']}: largest difference {entry['largest']:.3g} nats per token, "
                f"the line is {entry['line']:g} ({entry['tied_rows']} rows with a router tie)"
            )


def _read(path: Path) -> tuple[Tensor, Tensor]:
    tensors = load_tensors(path)
    tokens, scores = tensors.get("tokens"), tensors.get("log_probabilities")
    if (
        tokens is None
        or scores is None
        or tokens.dtype != torch.int64
        or scores.dtype != torch.float32
        or tokens.dim() != 2
        or scores.shape != (tokens.shape[0], tokens.shape[1] - 1)
        or scores.numel() == 0
    ):
        raise UserError(f"{path}: needs tokens int64 [R, T+1] and log_probabilities float32 [R, T]; run pretrain again")
    return tokens, scores


def _by_row(scorer: Scorer, tokens: Tensor) -> Tensor:
    """One row at a time, as training does it: another batch size may sum a matrix product in another order."""
    return torch.cat([scorer.log_probabilities(row[None]) for row in tokens])


def _compare(name: str, first: Tensor, second: Tensor, line: float | None, gaps: Tensor | None = None) -> Comparison:
    """first, second: [R, T]; gaps: smallest router gap of any layer per token [R, T], where ties may be the reason."""
    difference = (first.double() - second.double()).abs()
    difference = torch.where(difference.isnan(), torch.inf, difference)  # NaN agrees with nothing
    tied = torch.zeros(len(difference), dtype=torch.bool)
    if line is not None and gaps is not None:
        over = difference > line
        tie_before = (gaps < TIE).cummax(dim=1).values
        unexplained = (over & ~tie_before).any(dim=1)
        tied = over.any(dim=1) & ~unexplained
    judged = difference[~tied]
    largest = float(judged.max()) if judged.numel() else float("inf")
    few = int(tied.sum()) <= MAX_TIED_ROWS * len(tied)
    return Comparison(
        compared=name,
        tokens=first.numel(),
        mean=float(difference.mean()),
        shift=clustered_mean((second.double() - first.double()).mean(dim=1).numpy()).to_json(),
        largest=largest,
        identical=torch.equal(first, second),
        line=line,
        tied_rows=int(tied.sum()),
        passed=line is None or (largest <= line and few),
    )


@contextmanager
def _router_gaps(model: Any) -> Iterator[list[Tensor]]:
    """Collect from each MoE layer of a transformers model that runs inside how close each choice was, [T] a row."""
    gaps: list[Tensor] = []

    def collect(router: Any, _: Any, output: tuple[Tensor, ...]) -> None:
        gaps.append(_gap(router, output[0].detach().float()).cpu())

    routers = [
        module for module in model.modules() if "e_score_correction_bias" in dict(module.named_buffers(recurse=False))
    ]
    hooks = [router.register_forward_hook(collect) for router in routers]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def _gap(router: Any, logits: Tensor) -> Tensor:
    """How far each token is from choosing another group or expert: logits [N, E] -> [N]."""
    scores = (logits.sigmoid() + router.e_score_correction_bias).unflatten(1, (router.num_group, -1))
    nearest = torch.full((len(scores),), torch.inf, device=scores.device)
    if router.topk_group < router.num_group:
        groups = scores.topk(2, dim=2).values.sum(dim=2).sort(dim=1, descending=True)
        nearest = groups.values[:, router.topk_group - 1] - groups.values[:, router.topk_group]
        refused = torch.ones_like(groups.values, dtype=torch.bool)
        refused.scatter_(1, groups.indices[:, : router.topk_group], False)
        scores = scores.masked_fill(refused[..., None], float("-inf"))
    experts = scores.flatten(1).sort(dim=1, descending=True).values
    if router.top_k < experts.shape[1]:
        nearest = torch.minimum(nearest, experts[:, router.top_k - 1] - experts[:, router.top_k])
    return nearest
