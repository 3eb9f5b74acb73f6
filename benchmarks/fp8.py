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
    print_tables(times, kept, tokens)
    ratios = {
        "step": times["FP8, recomputation"] / times["BF16"],
        "kept, equal recomputation": kept["FP8, recomputation"] / kept["BF16, recomputation"],
        "kept, no recomputation": kept["FP8, recomputation"] / kept["BF16, nothing computed again"],
    }
    summary = {
        "benchmark": "fp8", "quick": arguments.quick, "threads": arguments.threads, "load_before": load_before,
        "load_after": os.getloadavg()[0], "seconds": times, "kept_bytes": kept, "ratios": ratios, "aims": AIMS,
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


def print_tables(times: dict[str, float], kept: dict[str, int], tokens: int) -> None:
    """Both figures with their ratios to BF16."""
    print(f"\n{'':36}{'step':>10}{'ratio':>8}   {'kept':>11}{'of BF16 as trained':>20}{'of all kept':>13}")
    whole, equal = kept["BF16, nothing computed again"], kept["BF16"]
    for name, seconds in times.items():
        print(
            f"{name:36}{seconds:>9.3f}s{seconds / times['BF16']:>7.2f}x   {kept[name] / 1e6:>8.1f} MB"
            f"{kept[name] / equal:>19.2f}x{kept[name] / whole:>12.2f}x"
        )
    same = kept["FP8, recomputation"] / kept["BF16, recomputation"]
    print(
        f"\nkept by the layers for {tokens} tokens: FP8 against BF16 with equal recomputation {same:.3f}x (aim 0.75x),"
    )
    print(f"against BF16 with nothing computed again {kept['FP8, recomputation'] / whole:.3f}x (aim 0.35x)\n")


if __name__ == "__main__":
    main()
