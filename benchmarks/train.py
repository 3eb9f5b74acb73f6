"""A whole training step beside transformers' DeepseekV3ForCausalLM: forward, backward, clipping, AdamW.

Three contestants per dtype, same weights, batches and threads, timed in turn in one process so that a disturbance hits
all: ours; transformers at its default (experts `grouped_mm`, attention `sdpa`); transformers `eager`, which is slow and
only shown for completeness. BF16 means `model.bfloat16()` for transformers, as people use it, and FP32 master weights,
gradients and moments with BF16 compute for ours, which moves twice the bytes in the optimizer. MTP is off, since
transformers does not train it. Weights come from our initialisation, since transformers leaves router weights
untrained.

Between steps ours keeps its gradient buffers, as our trainer does; transformers' are freed by `zero_grad()`, as usual.

The GEMM peak is measured between the steps in the same dtype; model FLOPs count active matrices and causal attention,
no recomputation. Peak memory is VmHWM of one process per contestant (`ru_maxrss` would start from the parent's). The
loss curves (a small model, a predictable synthetic text) show that the same thing is computed.

    python benchmarks/train.py            about ten minutes on two cores
    python benchmarks/train.py --quick    the same steps on a tiny model, to see that it runs: its figures mean nothing
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.nn import functional

from headrace.config.compose import load
from headrace.config.schema import ModelConfig
from headrace.model.initialisation import initialise, standard_deviation
from headrace.model.transformer import Transformer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import transformers_peer

CONTESTANTS = ("ours", "default", "eager")
DTYPES = ("fp32", "bf16")
WARM_UP = 3


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(peak_memory(arguments.memory, arguments.quick))
        return
    load_before = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {arguments.threads} threads, load average before the run {load_before:.2f}")
    rows = []
    for dtype in DTYPES:
        rows += step_rows(dtype, arguments)
    for dtype in DTYPES:
        rows += memory_rows(dtype, arguments)
    rows += curve_rows(arguments.curve_steps)
    print_table(rows)
    summary = {
        "benchmark": "train",
        "quick": arguments.quick,
        "threads": arguments.threads,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "rows": rows,
    }
    print(json.dumps(summary))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps per contestant")
    parser.add_argument("--curve-steps", type=int, default=50, help="steps of the loss curves")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--memory", metavar="CONTESTANT:DTYPE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.curve_steps = 2, 5
    return arguments


def benchmark_config(quick: bool) -> tuple[ModelConfig, int, int]:
    """The model (MTP off), sequences per step and tokens per sequence."""
    config = load(["experiment=tiny"]).model if quick else load(["model=small_100m"]).model
    plain = dataclasses.replace(config, num_nextn_predict_layers=0, initializer_range=standard_deviation(config))
    return plain, 4, 128 if quick else 512


def build(name: str, config: ModelConfig, dtype: str, copied: bool) -> torch.nn.Module:
    """A contestant's model with our initial weights, or with its own where a copy would disturb the measurement."""
    how = {"default": ("sdpa", "grouped_mm"), "eager": ("eager", "eager")}
    if name != "ours" and not copied:
        hub = transformers_peer.hub_config(config)
        hub._attn_implementation, hub._experts_implementation = how[name]
        model = transformers.DeepseekV3ForCausalLM(hub).train()
        return model.bfloat16() if dtype == "bf16" else model
    ours = Transformer(config, dtype if name == "ours" else "fp32")
    initialise(ours, config, seed=0)
    if name == "ours":
        return ours
    model = transformers_peer.peer_of(ours, *how[name])
    return model.bfloat16() if dtype == "bf16" else model


def contestant(name: str, model: torch.nn.Module, rate: float = 1e-4) -> Callable[[torch.Tensor], float]:
    """A function that does one training step on rows of T+1 tokens and returns the loss."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        if name == "ours":
            return model.losses(tokens, mtp_weight=0.0, balance_weight=0.0).main
        logits = model(tokens[:, :-1]).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def step(tokens: torch.Tensor) -> float:
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if name == "ours":
            model.store.recycle(parameters)
        else:
            optimizer.zero_grad()
        return loss.item()

    return step


def batches(config: ModelConfig, rows: int, tokens: int, steps: int) -> list[torch.Tensor]:
    """Rows of T+1 tokens of a text that is worth learning: mostly a fixed successor of each token, else a random
    one."""
    generator = torch.Generator().manual_seed(1)
    successor = torch.randperm(config.vocab_size, generator=generator)
    text = torch.randint(config.vocab_size, (steps, rows, tokens + 1), generator=generator)
    keep = torch.rand(text.shape, generator=generator) < 0.8
    for position in range(1, tokens + 1):
        follows = successor[text[..., position - 1]]
        text[..., position] = torch.where(keep[..., position], follows, text[..., position])
    return list(text)


def flops_per_token(config: ModelConfig, tokens: int) -> float:
    """Forward and backward: 6 per active matrix element, and causal attention."""
    with torch.device("meta"):
        model = Transformer(config, "fp32")
    active = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            active += parameter.numel() * config.num_experts_per_tok / config.n_routed_experts
        elif parameter.dim() == 2 and "embed_tokens" not in name:
            active += parameter.numel()
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * widths * tokens / 2
    return 6 * (active + attention)


def gemm_peak(dtype: str) -> float:
    """FLOP/s of the best of a few square products."""
    size = 2048
    a, b = (torch.randn(size, size).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]) for _ in range(2))
    best = 0.0
    for _ in range(3):
        for right in (b, b.T):
            started = time.perf_counter()
            a @ right
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def step_rows(dtype: str, arguments: argparse.Namespace) -> list[dict]:
    """Tokens per second and share of the GEMM peak, contestants taking turns."""
    config, rows, tokens = benchmark_config(arguments.quick)
    data = batches(config, rows, tokens, WARM_UP + arguments.steps)
    steps = {name: contestant(name, build(name, config, dtype, copied=True)) for name in CONTESTANTS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    peak = 0.0
    for index, batch in enumerate(data):
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch)
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
        peak = max(peak, gemm_peak(dtype))
    flops = flops_per_token(config, tokens) * rows * tokens
    for name, values in seconds.items():
        print(
            f"  {dtype} {name:8} median {statistics.median(values):.3f} s, best {min(values):.3f} s, "
            f"worst {max(values):.3f} s a step; load {os.getloadavg()[0]:.2f}"
        )
    print(f"  {dtype} GEMM peak {peak / 1e9:.0f} GFLOP/s, {flops / 1e9:.1f} GFLOP a step")
    rate = {name: rows * tokens / statistics.median(values) for name, values in seconds.items()}
    share = {name: flops / statistics.median(values) / peak for name, values in seconds.items()}
    steps.clear()
    gc.collect()
    return [
        row(f"{what}, {dtype}, beside {peer}", unit, values["ours"], values[peer])
        for what, unit, values in (("step", "tokens/s", rate), ("share of the GEMM peak", "", share))
        for peer in CONTESTANTS[1:]
    ]


def peak_memory(which: str, quick: bool) -> int:
    """The largest resident set this process has had, after a few steps, in bytes."""
    name, dtype = which.split(":")
    config, rows, tokens = benchmark_config(quick)
    step = contestant(name, build(name, config, dtype, copied=False))
    for batch in batches(config, rows, tokens, 3):
        step(batch)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def memory_rows(dtype: str, arguments: argparse.Namespace) -> list[dict]:
    """Peak memory, one process per contestant; a ratio below 1 means that ours needs less."""
    used = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--memory", f"{name}:{dtype}", "--threads", str(arguments.threads)]
        command += ["--quick"] if arguments.quick else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        used[name] = int(output.split()[-1]) / 2**30
    return [row(f"peak memory, {dtype}, beside {peer}", "GiB", used["ours"], used[peer]) for peer in CONTESTANTS[1:]]


def curve_rows(steps: int) -> list[dict]:
    """How far loss curves of a small model are apart: FP32 from each other, each BF16 from FP32 (mean over steps)."""
    config = dataclasses.replace(load(["experiment=tiny"]).model, num_nextn_predict_layers=0, initializer_range=0.02)
    data = batches(config, 4, 128, steps)
    curves = {}
    for name in ("ours", "default"):
        for dtype in DTYPES:
            step = contestant(name, build(name, config, dtype, copied=True), rate=3e-3)
            curves[name, dtype] = torch.tensor([step(batch) for batch in data], dtype=torch.float64)
    for (name, dtype), curve in curves.items():
        print(f"  loss {dtype} {name:8} first {curve[0]:.4f}, last {curve[-1]:.4f}")
    apart = (curves["ours", "fp32"] - curves["default", "fp32"]).abs().max().item()
    drift = {name: (curves[name, "bf16"] - curves["ours", "fp32"]).abs().mean().item() for name in ("ours", "default")}
    return [
        row("small model, largest difference of FP32 losses, aim below 1e-4", "nats", apart, 1e-4),
        row("small model, mean distance of BF16 losses from FP32", "nats", drift["ours"], drift["default"]),
    ]


def row(name: str, unit: str, ours: float, peer: float) -> dict:
    return {"name": name, "unit": unit, "ours": ours, "peer": peer, "ratio": ours / peer}


def print_table(rows: list[dict]) -> None:
    print(f"\n{'':60}{'ours':>12}{'peer':>12}{'ratio':>8}")
    for line in rows:
        name = f"{line['name']} [{line['unit']}]" if line["unit"] else line["name"]
        print(f"{name:60}{line['ours']:12.4g}{line['peer']:12.4g}{line['ratio']:8.2f}")


if __name__ == "__main__":
    main()
