"""One transformer layer of DeepSeek-V3's widths and its MoE feed-forward network alone, FP8 beside BF16; for gpu.py.

Headrace's own modules, forward and backward of 4,096 tokens, as in the microbatches of one optimizer step: weights are
cast or quantised before, once, and gradients are added up in FP32. Of V3's 256 experts there are 32, which with FP32
master weights, FP32 gradients and both formats take some 20 GB; each token still chooses 8, so that an expert gets
1,024 rows on average. Recomputation is what conf/precision/{bf16,fp8}.yaml say, and differs: FP8 computes norms and
MLA's up projections again. `bf16, recomputing` shows how much of the difference that is.

An FP8 back end is timed only where it gives what the emulation (`reference`, the numerics' specification) gives on the
same GPU: the output and the gradient of the input, less what the residual carries through, to LARGEST_ERROR norm-wise.
BF16 is compared with nothing. Experts are compared for equal routing: the whole layer's bound is wider, because a token
whose scores nearly tie may go to another expert.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from headrace.config.compose import load
from headrace.config.schema import ModelConfig
from headrace.fp8.activations import Activation
from headrace.fp8.linear import Weight
from headrace.fp8.numerics import Numerics
from headrace.fp8.weight_gradients import WeightGradientStore
from headrace.model import rope
from headrace.model.dispatch import LocalDispatcher
from headrace.model.experts import MoeFeedForward
from headrace.model.layer import Layer

MODULES = ("moe feed-forward", "transformer layer")
LARGEST_ERROR = {"moe feed-forward": 0.05, "transformer layer": 0.2}
WARM_UP, REPEATS = 3, 10
SMALL = 0.05  # of the residual, so that BF16's rounding of it does not hide what the layer adds


def shape(quick: bool = False) -> tuple[ModelConfig, int]:
    """The layer and how many tokens; `quick` is for Triton's interpreter."""
    config = load(["model=v3_671b"]).model
    few = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 32, "num_nextn_predict_layers": 0}
    narrow = {
        "hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 2, "q_lora_rank": 128,
        "kv_lora_rank": 128, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    }  # fmt: skip
    return dataclasses.replace(config, **(few | narrow if quick else few)), 128 if quick else 4096


def contestants(back_ends: tuple[str, ...]) -> dict[str, Numerics]:
    """BF16, BF16 with FP8's recomputation, the emulation, and the FP8 back ends to be timed."""
    bf16, fp8 = (load([f"precision={name}"]).precision for name in ("bf16", "fp8"))
    assert fp8.fp8 is not None
    found = {
        "bf16": Numerics("bf16", None, bf16.recompute),
        "bf16, recomputing": Numerics("bf16", None, fp8.recompute),
    }
    for back_end in ("reference", *back_ends):
        found[f"fp8, {back_end}"] = Numerics("bf16", dataclasses.replace(fp8.fp8, backend=back_end), fp8.recompute)
    return found


def measure(back_ends: tuple[str, ...], device: str = "cuda", quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for every module and contestant: milliseconds, or what is wrong."""
    config, tokens = shape(quick)
    for module in MODULES:
        expected: tuple[Tensor, Tensor] | None = None
        for name, numerics in sorted(contestants(back_ends).items(), key=lambda item: "reference" not in item[0]):
            row: dict[str, Any] = {"module": module, "precision": name, "tokens": tokens}
            try:
                trial = Trial(module, config, tokens, numerics, device)
                found = trial.results()
                if name == "fp8, reference":
                    expected = found
                    continue  # emulation is not timed
                if numerics.fp8:
                    assert expected is not None, "the emulation gave nothing to compare with"
                    row["error"] = error = max(map(distance, found, expected))
                    if not error < LARGEST_ERROR[module]:
                        yield row | {"wrong": f"{error:.2e} off the emulation"}
                        continue
                yield row | trial.times()
            except Exception as error:
                yield row | {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
            finally:
                trial = None  # its weights make room for the next one's
                if device == "cuda":
                    torch.cuda.empty_cache()


class Trial:
    """A module with weights and inputs that are the same for every contestant."""

    def __init__(self, module: str, config: ModelConfig, tokens: int, numerics: Numerics, device: str) -> None:
        torch.manual_seed(0)
        self.store, self.device = WeightGradientStore(), device
        dispatcher = LocalDispatcher(numerics.linear)
        with torch.device(device):
            self.rotation = rope.rotation(config, tokens, torch.device(device))
            self.module: Layer | MoeFeedForward
            if module == "transformer layer":
                self.module = Layer(config, 0, numerics, self.store, dispatcher)
            else:
                self.module = MoeFeedForward(config, numerics, self.store, dispatcher)
            for parameter in self.module.parameters():
                parameter.data.normal_(0, 0.006 * (7168 / config.hidden_size) ** 0.5) if parameter.dim() > 1 else (
                    parameter.data.fill_(1)
                )
            for buffer in self.module.buffers():
                buffer.zero_()
            size = SMALL if module == "transformer layer" else 1.0
            self.hidden = (torch.randn(1, tokens, config.hidden_size) * size).bfloat16().requires_grad_()
            self.gradient = (torch.randn(1, tokens, config.hidden_size) * size).bfloat16()

    def forward(self) -> Tensor:
        """[1, T, D]."""
        if isinstance(self.module, Layer):
            return self.module(self.hidden, self.rotation)[0]
        x_ND = Activation(self.hidden).flatten()
        return self.module(x_ND, self.module.gate(x_ND)).view_as(self.hidden)

    def step(self) -> Tensor:
        """Forward and backward; the output."""
        out = self.forward()
        out.backward(self.gradient)
        return out

    def results(self) -> tuple[Tensor, Tensor]:
        """Output and gradient of the input, less the residual's part."""
        out = self.step().detach()
        assert self.hidden.grad is not None
        dx, self.hidden.grad = self.hidden.grad, None
        carried = isinstance(self.module, Layer)
        return (out - self.hidden.detach(), dx - self.gradient) if carried else (out, dx)

    def times(self) -> dict[str, float]:
        """Median milliseconds of a step, and of making the weights' operands, once for each step of the optimizer."""
        weights = [module for module in self.module.modules() if isinstance(module, Weight)]

        def cast() -> None:
            for weight in weights:
                weight.gemms.weight(weight.weight.detach(), weight.operand())

        with self.store.accumulating():
            step = median_milliseconds(self.step, self.device)
        return {"ms": step, "weights_ms": median_milliseconds(cast, self.device)}


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def median_milliseconds(run: Callable[[], object], device: str) -> float:
    """Of a call, on the device, waits for the host included. 0 without a GPU: nothing there is worth a figure."""
    if device != "cuda":
        run()
        return 0.0
    times = []
    for _ in range(WARM_UP + REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])
