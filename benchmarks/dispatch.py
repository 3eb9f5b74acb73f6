"""Bytes that expert parallelism sends: two hops (`parallel/dispatch.py`) beside one flat all-to-all, in one run.

First V3's layout, counted: 256 experts on 64 GPUs in 8 nodes, 8 of them chosen from 4 of 8 groups, 7,168 wide, with
random routing. Two flat all-to-alls are counted beside ours: a row per (token, expert), and a row per (token, rank).
Across nodes is what is scarce: there links are 3.2 times slower than inside (DeepSeek-V3, section 3.2.2). Inside nodes
the two hops send more, which is the price.

Then the same counting, with everything smaller, beside what four gloo ranks in two nodes hand to torch.distributed, for
our dispatcher and for a flat all-to-all of pairs: counted and sent have to be equal. Only bytes are reported: sending
between processes of one machine says nothing about the time on a network.

    python benchmarks/dispatch.py            half a minute
    python benchmarks/dispatch.py --quick    fewer tokens
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from headrace.config.compose import load
from headrace.config.schema import ModelConfig
from headrace.fp8.gemms import Gemms
from headrace.fp8.numerics import Numerics
from headrace.model.router import Router, Routing
from headrace.parallel.dispatch import make_dispatcher
from headrace.parallel.mesh import Groups, Mesh

ID, WEIGHT = 2, 4  # bytes
FORMATS = ("FP8", "BF16")
WAYS = ("two hops", "flat, per expert", "flat, per rank")


@dataclass(frozen=True)
class Layout:
    """An expert group and the router's shape."""

    ranks: int
    node_size: int
    config: ModelConfig

    def row_bytes(self, kind: str) -> int:
        """Of one packed token."""
        width = self.config.hidden_size
        return width + 4 * -(-width // 128) if kind == "FP8" else 2 * width


Traffic = dict[str, int]  # bytes {"across", "inside"} nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.folder, 64 if arguments.quick else 512)
        return
    v3 = Layout(64, 8, load(["model=v3_671b"]).model)
    tokens = 2048 if arguments.quick else 16384
    counted = count_v3(v3, tokens)
    print(f"V3: bytes sent per token of one layer's dispatch, and of one combine; random routing, {tokens} tokens")
    print_table(counted)
    with tempfile.TemporaryDirectory() as folder:
        sent = start_ranks(Path(folder), arguments.quick)
    print("\nfour gloo ranks in two nodes: bytes counted, and handed to torch.distributed")
    for name, row in sent.items():
        print(f"  {name:24} across {row['counted']['across']:>10} {row['sent']['across']:>10}"
              f"   inside {row['counted']['inside']:>10} {row['sent']['inside']:>10}")  # fmt: skip
    assert all(row["counted"] == row["sent"] for row in sent.values()), "counted and sent differ"
    ours, *flat = (counted["dispatch FP8"][way]["across"] for way in WAYS)
    ratios = {way: ours / theirs for way, theirs in zip(WAYS[1:], flat, strict=True)}
    summary = {
        "benchmark": "dispatch", "quick": arguments.quick, "tokens": tokens, "bytes_per_token": counted,
        "ratio_across_nodes": ratios, "gloo": sent,
    }  # fmt: skip
    print(json.dumps(summary))


def print_table(counted: dict[str, dict[str, dict[str, float]]]) -> None:
    """Bytes per token, and ours as a share of each flat one's."""
    print(f"  {'':16}{'':18}{'across nodes':>14}{'inside':>10}{'ours / this, across':>22}")
    for name, ways in counted.items():
        for way, traffic in ways.items():
            ratio = ways["two hops"]["across"] / traffic["across"]
            print(f"  {name:16}{way:18}{traffic['across']:>14,.0f}{traffic['inside']:>10,.0f}{ratio:>22.3f}")


def count_v3(layout: Layout, tokens: int) -> dict[str, dict[str, dict[str, float]]]:
    """Bytes per token: the tokens are spread over homes evenly."""
    experts_NK = choose(layout.config, tokens, seed=0)
    home_N = torch.arange(tokens) % layout.ranks
    bare = dict.fromkeys(WAYS, 0)
    found = {}
    for name, row, extra in [
        *((f"dispatch {kind}", layout.row_bytes(kind), extra_bytes(layout)) for kind in FORMATS),
        ("combine BF16", layout.row_bytes("BF16"), bare),
    ]:
        counted = count(layout, experts_NK, home_N)
        found[name] = {
            way: {where: rows * (row + extra[way]) / tokens for where, rows in counted[way].items()} for way in WAYS
        }
    return found


def extra_bytes(layout: Layout) -> dict[str, int]:
    """What travels with a row: expert ids, routing weights, and in two hops the home rank."""
    chosen = layout.config.num_experts_per_tok
    several = chosen * (ID + WEIGHT)
    return {"two hops": several + ID, "flat, per expert": ID + WEIGHT, "flat, per rank": several}


def choose(config: ModelConfig, tokens: int, seed: int) -> Tensor:
    """Experts [N, K] of random scores, by the router's own selection."""
    scores = torch.rand(tokens, config.n_routed_experts, generator=torch.Generator().manual_seed(seed))
    return Router(config).select(scores)


def count(layout: Layout, experts_NK: Tensor, home_N: Tensor) -> dict[str, Traffic]:
    """Rows that leave their rank, across and inside nodes, for each way of sending."""
    ranks, size = layout.ranks, layout.node_size
    rank_NK = experts_NK // (layout.config.n_routed_experts // ranks)
    reached_NR = torch.zeros(len(experts_NK), ranks, dtype=torch.bool).scatter_(1, rank_NK, True)
    pairs_NR = torch.zeros(len(experts_NK), ranks, dtype=torch.long).scatter_add_(1, rank_NK, torch.ones_like(rank_NK))
    target_R, node_N, place_N = torch.arange(ranks), home_N // size, home_N % size
    near_NR = (target_R // size) == node_N[:, None]
    away_NR = target_R != home_N[:, None]
    nodes_NM = reached_NR.view(-1, ranks // size, size).any(2)
    moved_NR = reached_NR & (target_R % size != place_N[:, None])  # in the second hop
    return {
        "two hops": {
            "across": int(nodes_NM.sum() - nodes_NM.gather(1, node_N[:, None]).sum()),
            "inside": int(moved_NR.sum()),
        },
        "flat, per expert": {
            "across": int(pairs_NR[~near_NR].sum()),
            "inside": int(pairs_NR[near_NR & away_NR].sum()),
        },
        "flat, per rank": {
            "across": int(reached_NR[~near_NR].sum()),
            "inside": int(reached_NR[near_NR & away_NR].sum()),
        },
    }


def small() -> Layout:
    """Four ranks in two nodes."""
    config = dataclasses.replace(
        load(["experiment=tiny"]).model, hidden_size=896, n_routed_experts=16, n_group=4, topk_group=2,
        num_experts_per_tok=4,
    )  # fmt: skip
    return Layout(4, 2, config)


def start_ranks(folder: Path, quick: bool) -> dict[str, dict[str, Traffic]]:
    """Runs four processes of this file; the sums over ranks."""
    command = [sys.executable, __file__, "--folder", str(folder), *(["--quick"] if quick else [])]
    processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(small().ranks)]
    try:
        for process in processes:
            if process.wait(timeout=300):
                raise RuntimeError("a rank failed")
    finally:
        for process in processes:
            process.kill()
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(processes))]
    return {
        name: {
            key: {where: sum(result[name][key][where] for result in results) for where in ("across", "inside")}
            for key in ("counted", "sent")
        }
        for name in results[0]
    }


def run_rank(rank: int, folder: Path, tokens: int) -> None:
    """One rank: what it counts and what it sends, for both ways and formats."""
    torch.set_num_threads(1)
    layout = small()
    store = distributed.FileStore(str(folder / "store"), layout.ranks)
    timeout = timedelta(seconds=60)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=layout.ranks, timeout=timeout)
    mesh = Mesh(1, layout.ranks, layout.ranks, layout.node_size, rank)
    config = load(["experiment=tiny", "precision=fp8"])
    assert config.precision.fp8 is not None
    fp8 = dataclasses.replace(config.precision.fp8, backend="reference")
    x_ND = torch.randn(tokens, layout.config.hidden_size, generator=torch.Generator().manual_seed(rank)).bfloat16()
    experts_NK = choose(layout.config, tokens, seed=1 + rank)
    counts_E = torch.bincount(experts_NK.flatten(), minlength=layout.config.n_routed_experts)
    routing = Routing(experts_NK, torch.rand(experts_NK.shape), torch.empty(0), counts_E)
    rows = counted_everywhere(layout, tokens)[rank]
    found: dict[str, dict[str, Traffic]] = {}
    for kind, numerics in (("FP8", Numerics("bf16", fp8)), ("BF16", Numerics("bf16"))):
        dispatcher = make_dispatcher(mesh, Groups(mesh, timeout), numerics.linear, config.parallel)
        ways: dict[str, Callable[[], Any]] = {
            "two hops": lambda d=dispatcher: d.send(x_ND, routing),
            "flat, per expert": lambda g=numerics.linear: flat(layout, g, x_ND, routing),
        }
        for way, send in ways.items():
            width = layout.row_bytes(kind) + extra_bytes(layout)[way]
            counted = {where: number * width for where, number in rows[way].items()}
            found[f"{way}, {kind}"] = {"counted": counted, "sent": measured(layout.node_size, send)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def counted_everywhere(layout: Layout, tokens: int) -> list[dict[str, Traffic]]:
    """Rows each rank is to send. In the second hop a rank passes on other ranks' tokens, so all routings are needed."""
    return [
        counted_by(layout, [choose(layout.config, tokens, seed=1 + home) for home in range(layout.ranks)], rank)
        for rank in range(layout.ranks)
    ]


def counted_by(layout: Layout, experts: list[Tensor], rank: int) -> dict[str, Traffic]:
    """Rows that `rank` sends: its own tokens, and in the second hop those of the ranks at its place in other nodes."""
    size, per_rank = layout.node_size, layout.config.n_routed_experts // layout.ranks
    own = count(layout, experts[rank], torch.full((len(experts[rank]),), rank))
    node, place = divmod(rank, size)
    passed = 0
    for home in range(place, layout.ranks, size):
        for chosen in experts[home].tolist():
            reached = {expert // per_rank for expert in chosen}
            passed += sum(target // size == node and target != rank for target in reached)
    return {**own, "two hops": {"across": own["two hops"]["across"], "inside": passed}}


def flat(layout: Layout, gemms: Gemms, x_ND: Tensor, routing: Routing) -> Tensor:
    """The peer: one all-to-all with a row per (token, expert)."""
    order = torch.argsort(routing.experts_NK.flatten(), stable=True)
    token, expert = order // routing.experts_NK.shape[1], routing.experts_NK.flatten()[order]
    packed = gemms.pack(gemms.rows(x_ND, "dispatched"))
    tail = [expert[:, None].to(torch.int16), routing.weights_NK.flatten()[order][:, None]]
    payload = torch.cat([packed[token], *(part.view(torch.uint8) for part in tail)], dim=1)
    sent = routing.counts_E.view(layout.ranks, -1).sum(1)
    arrived = torch.empty_like(sent)
    distributed.all_to_all_single(arrived, sent)
    out = payload.new_empty(int(arrived.sum()), payload.shape[1])
    distributed.all_to_all_single(out, payload, arrived.tolist(), sent.tolist())
    return out


def measured(node_size: int, send: Callable[[], Any]) -> Traffic:
    """Payload bytes that `send` hands to torch.distributed for other ranks (int64 counts of rows left out)."""
    original, traffic, here = distributed.all_to_all_single, {"across": 0, "inside": 0}, distributed.get_rank()

    def metered(out: Tensor, given: Tensor, arrived: Any = None, sent: Any = None, group: Any = None) -> Any:
        members = distributed.get_process_group_ranks(group or distributed.group.WORLD)
        if given.dtype == torch.uint8:
            for target, number in zip(members, sent, strict=True):
                where = "inside" if target // node_size == here // node_size else "across"
                traffic[where] += number * given.shape[1] * (target != here)
        return original(out, given, arrived, sent, group=group)

    distributed.all_to_all_single = metered
    try:
        send()
    finally:
        distributed.all_to_all_single = original
    return traffic


if __name__ == "__main__":
    main()
