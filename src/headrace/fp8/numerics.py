"""What runs in which format: the precision group of the configuration, resolved for one device.

`Numerics` is what the model is built with. It decides which `Gemms` a linear layer gets; the embedding, the output
head, the router, the norms and the attention core never run in FP8 (report, section 3.3.1). `describe` is the same in
words, for the log, for `numerics.json` beside the run's results, and for the report.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from headrace.config.schema import Fp8Config, PrecisionConfig, RecomputeConfig
from headrace.fp8.backends import fp8_gemms, pick
from headrace.fp8.gemms import Compute, Gemms, PlainGemms, dtype_of

_KEEP_ALL_BUT_SWIGLU = RecomputeConfig(norms=False, up_projections=False, swiglu=True)


@dataclass(frozen=True)
class Numerics:
    """Formats of one model; `fp8.backend` is resolved, never `auto`."""

    compute: Compute
    fp8: Fp8Config | None = None
    recompute: RecomputeConfig = _KEEP_ALL_BUT_SWIGLU

    @staticmethod
    def of(given: "Numerics | Compute") -> "Numerics":
        """The bare compute dtype stands for no FP8."""
        return given if isinstance(given, Numerics) else Numerics(given)

    @staticmethod
    def resolve(precision: PrecisionConfig, device: torch.device) -> "Numerics":
        """`precision` on `device`; raises `UserError` where the back end asked for is missing or cannot do it."""
        fp8 = precision.fp8 and replace(precision.fp8, backend=pick(precision.fp8, device))
        return Numerics(precision.compute, fp8, precision.recompute)

    @property
    def name(self) -> str:
        """fp8, bf16 or fp32."""
        return "fp8" if self.fp8 else self.compute

    @property
    def dtype(self) -> torch.dtype:
        """Of activations between the GEMMs."""
        return dtype_of(self.compute)

    @property
    def plain(self) -> Gemms:
        """For what is not in FP8."""
        return PlainGemms(self.compute)

    @property
    def linear(self) -> Gemms:
        """For attention projections and feed-forward networks."""
        return fp8_gemms(self.fp8, self.compute) if self.fp8 else self.plain

    @property
    def mtp_projection(self) -> Gemms:
        """For eh_proj."""
        return self.linear if self.fp8 and self.fp8.mtp_projection == "fp8" else self.plain


def describe(precision: PrecisionConfig, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the table "what runs in which format": {"what", "format"}, both text."""
    numerics = Numerics.resolve(precision, device)
    plain = numerics.compute.upper()
    rows = [*(_fp8_rows(numerics.fp8, plain) if numerics.fp8 else _plain_rows(plain))]
    rows += [
        ("embedding, output head, attention core", plain),
        ("router, norms' arithmetic, softmax and loss", "FP32"),
        ("master weights, weight gradients", "FP32"),
        ("optimizer moments", precision.optimizer_moments.upper()),
        ("computed again in the backward pass", ", ".join(_recomputed(precision.recompute)) or "nothing"),
    ]
    return [{"what": what, "format": text} for what, text in rows]


def _plain_rows(plain: str) -> list[tuple[str, str]]:
    return [("linear layers and experts: forward, input gradient, weight gradient", plain)]


def _fp8_rows(fp8: Fp8Config, plain: str) -> list[tuple[str, str]]:
    accumulation = {
        "fp32": "FP32",
        "hopper": f"14-bit as on Hopper, promotion to FP32 {'every 128' if fp8.promotion else 'off'}",
    }[fp8.accumulation]
    tile = {"tensor": "one tile"}
    scale = {"fp32": "FP32", "power_of_two": "power-of-two"}
    return [
        ("back end of the FP8 GEMMs", fp8.backend),
        (
            "linear layers and experts: forward, input gradient, weight gradient",
            f"E4M3, accumulated in {accumulation}, results {plain} and FP32",
        ),
        ("  activations", f"{tile.get(fp8.activation_tile, fp8.activation_tile)}, {scale[fp8.scales]} scales"),
        ("  gradients of activations", f"{tile.get(fp8.gradient_tile, fp8.gradient_tile)}, {scale[fp8.scales]} scales"),
        ("  weights", f"{tile.get(fp8.weight_tile, fp8.weight_tile)}, {scale[fp8.scales]} scales, once a step"),
        ("  operands of weight gradients", f"128x1, {scale[fp8.transposed_scales]} scales"),
        (
            "  sent to experts; gradient before the down projection",
            f"1x128, {scale[fp8.dispatched_scales]} scales",
        ),
        ("  gradients sent to experts", {"e4m3": "E4M3, 1x128", "compute": plain}[fp8.dispatched_gradients]),
        ("kept inputs of linear layers", "E4M3, 1x128"),
        ("kept input of the projection after attention", fp8.attention_output_cache.upper()),
        ("kept inputs of SwiGLU", fp8.swiglu_input_cache.upper()),
        ("MTP projection (eh_proj)", "as linear layers" if fp8.mtp_projection == "fp8" else plain),
    ]


def _recomputed(recompute: RecomputeConfig) -> list[str]:
    names = {
        "norms": recompute.norms,
        "MLA's up projections": recompute.up_projections,
        "SwiGLU": recompute.swiglu,
    }
    return [name for name, chosen in names.items() if chosen]
