"""FP8 by emulation beside BF16 on a CPU: time of a training step, and bytes kept for the backward pass, in one run.

Time: forward, backward, clipping and AdamW of the same model on the same batch, in turn. FP8 is emulated on a CPU, so
its step is longer; this says by how much, and how much of that is the FP8 and how much the recomputation.

Memory: what autograd keeps between forward and backward, every storage counted once, weights left out. Sequences are
longer than `causal._KEEP`, so that attention probabilities are computed again in every case, as fused attention on a
GPU does; E4M3 takes one byte, E5M6 one and a half, scales four for each 128.

    python benchmarks/fp8.py            about five minutes on two cores
    python benchmarks/fp8.py --quick    a tiny model, to see that it runs: its figures mean nothing
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from dataclasses import dataclass

import torch

from headrace.config.compose import load
from headrace.config.schema import ModelConfig, PrecisionConfig, RecomputeConfig
from headrace.fp8.linear import Weight
from headrace.fp8.numerics import Numerics
from headrace.model.initialisation import initialise
from headrace.model.transformer import Transformer

CPU = torch.device("cpu")
AIMS = {"equal recomputation": 0.75, "no recomputation": 0.35}


@dataclass(frozen=True)
class Case:
    """One way to train the same model."""

    name: str
    precision: PrecisionConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps per case")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg()[0]
    model = load(["experiment=tiny" if arguments.quick else "model=small_100m"]).model
    tokens = 1152 if arguments.quick else 2048
    model = dataclasses.replace(model, max_position_embeddings=max(model.max_position_embeddings, tokens))
    print(f"torch {torch.__version__}, {arguments.threads} threads, load average before the run {load_before:.2f}")
    times = step_times(model, 2 if arguments.quick else arguments.steps)
    kept = {case.name: kept_bytes(model, case.precision, tokens) for case in cases()}
    layer = v3_layer(quick=arguments.quick)
    kept_v3 = {case.name: kept_bytes(layer, case.precision, 1152) for case in cases()}
    print_tables(times, kept, kept_v3)
    ratios = {
        "step": times["FP8, recomputation"] / times["BF16"],
        **{f"kept, {name}": value for name, value in memory_ratios(kept).items()},
        **{f"kept by a V3 layer, {name}": value for name, value in memory_ratios(kept_v3).items()},
    }
    summary = {
        "benchmark": "fp8", "quick": arguments.quick, "threads": arguments.threads,
        "load_before": load_before, "load_after": os.getloadavg()[0], "seconds": times,
        "kept_bytes": kept, "kept_bytes_v3_layer": kept_v3, "ratios": ratios, "aims": AIMS,
    }  # fmt: skip
    print(json.dumps(summary))


def cases() -> list[Case]:
    """BF16 with and without recomputation, and FP8 as `precision=fp8` has it."""
    bf16, fp8 = (load([f"precision={name}"]).precision for name in ("bf16", "fp8"))
    again, nothing = RecomputeConfig(True, True, True), RecomputeConfig(False, False, False)
    return [
        Case("BF16", bf16),
        Case("BF16, nothing computed again", dataclasses.replace(bf16, recompute=nothing)),
        Case("BF16, recomputation", dataclasses.replace(bf16, recompute=again)),
        Case("FP8, recomputation", dataclasses.replace(fp8, recompute=again)),
        Case("FP8, only SwiGLU computed again", dataclasses.replace(fp8, recompute=bf16.recompute)),
    ]


def build(config: ModelConfig, precision: PrecisionConfig) -> Transformer:
    """The same weights for every case."""
    model = Transformer(config, Numerics.resolve(precision, CPU))
    initialise(model, config, seed=0)
    return model


def batch(config: ModelConfig, rows: int, tokens: int) -> torch.Tensor:
    """Random tokens with their targets."""
    shape = (rows, tokens + 1 + config.num_nextn_predict_layers)
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def step_times(config: ModelConfig, steps: int) -> dict[str, float]:
    """Median seconds of a whole step of 2,048 tokens, cases in turn."""
    tokens = batch(config, 4, 512)
    contestants = {}
    for case in cases():
        model = build(config, case.precision)
        contestants[case.name] = (model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(steps + 2):
        for name, (model, optimizer) in contestants.items():
            started = time.perf_counter()
            train_step(model, optimizer, tokens)
            if number >= 2:  # the first steps choose kernels and fault pages in
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def train_step(model: Transformer, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """Forward, backward, clipping, AdamW."""
    with model.store.accumulating():
        model.losses(tokens, 0.3, 1e-4).total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.store.recycle(list(model.parameters()))


def kept_bytes(config: ModelConfig, precision: PrecisionConfig, tokens: int) -> int:
    """Bytes that the layers keep of one forward pass of `tokens` tokens; MTP and output head are left out."""
    model = build(config, precision)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, Weight):
            weights |= {tensor.untyped_storage().data_ptr() for tensor in module.operand()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    rows = batch(config, 1, tokens)[:, :tokens]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _, _ = model.hidden_states(rows)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def v3_layer(quick: bool) -> ModelConfig:
    """One mixture-of-experts layer of V3 at its widths, 16 experts instead of 256 and a small vocabulary."""
    config = load(["model=v3_671b"]).model
    narrow = {"hidden_size": 896, "q_lora_rank": 192, "kv_lora_rank": 64, "moe_intermediate_size": 256} if quick else {}
    return dataclasses.replace(
        config, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=16, n_group=1, topk_group=1,
        num_nextn_predict_layers=0, vocab_size=1024, num_attention_heads=16 if quick else 128, **narrow,
    )  # fmt: skip


def memory_ratios(kept: dict[str, int]) -> dict[str, float]:
    """FP8 against BF16 with the same recomputation, and against BF16 with none."""
    fp8 = kept["FP8, recomputation"]
    return {
        "equal recomputation": fp8 / kept["BF16, recomputation"],
        "no recomputation": fp8 / kept["BF16, nothing computed again"],
    }


def print_tables(times: dict[str, float], kept: dict[str, int], kept_v3: dict[str, int]) -> None:
    """Time, and bytes kept by the layers of the whole model and by one layer of V3's widths."""
    print(f"\n{'':34}{'step':>10}{'of BF16':>9}{'kept':>13}{'V3 layer keeps':>19}")
    for name, seconds in times.items():
        ratio = f"{seconds / times['BF16']:.2f}x"
        print(f"{name:34}{seconds:>9.3f}s{ratio:>9}{kept[name] / 1e6:>10.1f} MB{kept_v3[name] / 1e6:>16.1f} MB")
    print(f"\n{'FP8 keeps, against BF16 with':34}{'aim':>10}{'':9}{'':3}{'this model':>10}{'V3 layer':>19}")
    for name, aim in AIMS.items():
        ours, v3 = memory_ratios(kept)[name], memory_ratios(kept_v3)[name]
        print(f"{name:34}{aim:>9.2f}x{'':12}{ours:>9.3f}x{v3:>18.3f}x")
    print()


if __name__ == "__main__":
    main()
