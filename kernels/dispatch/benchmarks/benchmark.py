"""Speed of dispatch and combine at DeepSeek-V3's shapes. The last line is one JSON object.

    python kernels/dispatch/benchmarks/benchmark.py [TOKENS]                        one GPU: the Triton kernels
    torchrun --nproc-per-node 8 kernels/dispatch/benchmarks/benchmark.py [TOKENS]   a node: the movers over NVLink

Bytes are those that have to be moved: each row read once and written once (one GPU), or what leaves a rank for the
others (node). DeepEP's first version moved 153 GB/s (dispatch) and 158 GB/s (combine) between 8 H800 (its README).
"""

import json
import os
import sys

import torch

from headrace_dispatch import BufferPlan, combine, connect, lay_out, permute, permute_quantise, reference

EXPERTS, CHOSEN, COLUMNS, SMS = 256, 8, 7168, 20


def seconds(run) -> float:
    """Median time of a call, from events on the device."""
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median") * 1e-3


def choose(tokens: int) -> torch.Tensor:
    """Balanced random experts, int32 [tokens, 8]."""
    return torch.rand(tokens, EXPERTS, device="cuda").topk(CHOSEN, dim=1).indices.int()


def one_gpu(tokens: int) -> dict:
    """The Triton kernels, in TB/s, beside the reference in PyTorch."""
    experts, x = choose(tokens), torch.randn(tokens, COLUMNS, device="cuda").bfloat16()
    layout = lay_out(experts, EXPERTS)
    rows = permute(x, layout)
    assert torch.equal(rows, reference.permute(x, layout))
    codes, expected = permute_quantise(x, layout)[0], reference.permute_quantise(x, layout)[0]
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(combine(rows, layout), reference.combine(rows, layout))
    one_row, moved = COLUMNS * 2, tokens * CHOSEN
    quantised = COLUMNS + COLUMNS // 32
    jobs = {
        "permute": (lambda: permute(x, layout), (tokens + len(rows)) * one_row),
        "permute_quantise": (lambda: permute_quantise(x, layout), tokens * one_row + len(rows) * quantised),
        "combine": (lambda: combine(rows, layout), (tokens + moved) * one_row),
        "reference_permute": (lambda: reference.permute(x, layout), (tokens + len(rows)) * one_row),
        "reference_combine": (lambda: reference.combine(rows, layout), (tokens + moved) * one_row),
    }
    speeds = {f"{name}_tb_s": size / seconds(run) / 1e12 for name, (run, size) in jobs.items()}
    return {"lay_out_us": seconds(lambda: lay_out(experts, EXPERTS)) * 1e6, **speeds}


def node(tokens: int) -> dict:
    """The movers, in GB/s that leave this rank for others."""
    from torch import distributed

    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.cuda.set_device(rank)
    torch.manual_seed(rank)

    def gather(own: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(own) for _ in range(ranks)]
        distributed.all_gather(everyone, own)
        return everyone

    plan = BufferPlan(ranks, tokens, COLUMNS, CHOSEN, EXPERTS // ranks)
    exchange = connect(plan, rank, gather, blocks=SMS)
    experts, weights = choose(tokens), torch.rand(tokens, CHOSEN, device="cuda")
    codes = torch.randn(tokens, COLUMNS, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(tokens, COLUMNS // 128, device="cuda")
    goes = plan.destinations(experts)
    away = (goes.sum() - goes[:, rank].sum()).item()
    times: dict[str, list[float]] = {"dispatch": [], "combine": []}
    steps = {
        "dispatch": lambda: exchange.dispatch(codes, scales, experts, weights),
        "combine": lambda: exchange.combine(experts),
    }
    for _ in range(30):
        for name, step in steps.items():
            distributed.barrier()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e-3)
    medians = {name: sorted(values[10:])[10] for name, values in times.items()}
    distributed.barrier()
    return {
        "rank": rank,
        "ranks": ranks,
        "sms": SMS,
        "dispatch_gb_s": away * (COLUMNS + COLUMNS // 32) / medians["dispatch"] / 1e9,
        "combine_gb_s": away * COLUMNS * 2 / medians["combine"] / 1e9,
    }


def main(tokens: int) -> None:
    """Time and print."""
    measured = node(tokens) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else one_gpu(tokens)
    if measured.get("rank", 0) == 0:
        about = {"benchmark": "dispatch", "card": torch.cuda.get_device_name(), "torch": torch.__version__}
        result = about | {"tokens": tokens} | measured
        for name, value in result.items():
            print(f"{name:24} {value}")
        print(json.dumps(result))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("This benchmark times kernels on a GPU, and there is none here: nothing was measured.")
        sys.exit(0)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
