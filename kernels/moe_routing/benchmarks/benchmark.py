"""Time of the routing kernels beside the PyTorch reference, at DeepSeek-V3's shape. The last line is one JSON object.

python kernels/moe_routing/benchmarks/benchmark.py [TOKENS]
"""

import json
import sys

import torch

from headrace_moe_routing import reference, route, route_backward

EXPERTS, GROUPS, GROUPS_CHOSEN, CHOSEN, FACTOR = 256, 8, 4, 8, 2.5


def microseconds(run) -> float:
    """Median time of a call, from events on the device."""
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median") * 1e3


def main(tokens: int) -> None:
    """Check, time, print."""
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    bias = torch.randn(EXPERTS, device="cuda") * 0.01
    rule = (GROUPS, GROUPS_CHOSEN, CHOSEN, True, FACTOR)
    routed, expected = route(logits, bias, *rule), reference.route(logits, bias, *rule)
    same = (routed.experts == expected.experts).all(dim=1).float().mean().item()
    dweights = torch.randn_like(routed.weights)
    result = {
        "benchmark": "moe_routing",
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": tokens,
        "experts": EXPERTS,
        "tokens_with_the_reference's_experts": same,  # short of 1 by tokens whose scores tie within an ulp
        "route_us": microseconds(lambda: route(logits, bias, *rule)),
        "reference_us": microseconds(lambda: reference.route(logits, bias, *rule)),
        "backward_us": microseconds(lambda: route_backward(dweights, logits, routed.experts, True, FACTOR)),
    }
    for name, value in result.items():
        print(f"{name:36} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("This benchmark times kernels on a GPU, and there is none here: nothing was measured.")
        sys.exit(0)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16384)
