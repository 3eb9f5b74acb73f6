"""Whether the kernels compute what their references compute, on a GPU or, small, in Triton's interpreter; for gpu.py.

Each function yields (name of a kernel, what is wrong or nothing) for one package. Inputs have edges that are no
multiples of 128 where the kernel takes them. Quantisers and permutations must give their reference's bytes; products
may differ by what a 14-bit accumulator that is promoted every 128 elements may lose.

`accumulation` is the argument for promotion itself: K = 8192 and positive data, where losses towards zero add up.
By the emulation in src/headrace/fp8/accumulator.py (`python -m headrace.fp8.accumulator`; nothing was compared with a
GPU) a 14-bit accumulator is then off by 1.3e-1 norm-wise, and by 6.2e-4 if it is promoted every 128: the bound lies
between, so that a kernel which leaves its sums in the tensor core fails. Sums around zero lose 1.3e-4 promoted and,
at that depth, 1.9e-3 unpromoted: this is what the bound on the other products is for.

Gluon has no interpreter: on a CPU its checks yield nothing. On a GPU it is compared with the Triton kernels.
Shapes: M rows, N outputs, K contraction, S rows sorted by expert, E experts.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
PRODUCT_ERROR = 3e-4  # norm-wise against float64 sums, data around zero: 14 bits promoted give 1.3e-4
ACCUMULATION_ERROR = 2e-3  # the same for positive data at K = ACCUMULATION_DEPTH: 6.2e-4, or 1.3e-1 without promotion
ACCUMULATION_DEPTH = 8192
GLUON_DIFFERENCE = 1e-5  # from Triton, norm-wise: the same instructions, FP32 sums in the same order
PRODUCTS = ("dense", "m_grouped", "k_grouped")
Found = tuple[str, str]


def device() -> str:
    """Where the checks run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_script(path: Path) -> ModuleType:
    """A script as a module, under a name that no other has."""
    specification = importlib.util.spec_from_file_location("_".join(path.with_suffix("").parts[-3:]), path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def attempt(name: str, check: Callable[[], str]) -> Found:
    """The result of a check; what it raises is what is wrong."""
    try:
        return name, check()
    except Exception as error:
        return name, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal random numbers."""
    return torch.randn(shape, device=device()).to(dtype)


def quantisation() -> Iterator[Found]:
    """headrace_fp8_quantisation, by the rules of its own benchmark: no byte differs where no exponential precedes."""
    package = importlib.import_module("headrace_fp8_quantisation")
    reference = importlib.import_module("headrace_fp8_quantisation.reference")
    difference = load_script(KERNELS / "fp8_quantisation" / "benchmarks" / "benchmark.py").difference
    wide = normal(200, 336) * torch.exp2(torch.randint(-9, 9, (200, 336), device=device())).bfloat16()
    wide[3], wide[5, 7], wide[130, 200] = 0, torch.nan, torch.inf
    codes = torch.randint(0, 0x7F, (256, 384), dtype=torch.uint8, device=device()).view(torch.float8_e4m3fn)
    gate, up, routing = normal(256, 384), normal(256, 384), torch.rand(256, device=device())
    angles = torch.rand(40, 16, device=device())
    rotation = angles.cos(), angles.sin(), 0.07
    heads, gradients = ((1, 40, 2, 96), (1, 40, 2, 128), (1, 40, 32)), ((1, 2, 40, 96), (1, 2, 40, 96), (1, 2, 40, 64))
    cases: list[tuple[str, tuple[Any, ...], bool]] = [
        ("quantise_rows", (wide,), True),
        ("quantise_rows", (wide, True), True),
        ("quantise_rows_and_columns", (wide,), True),
        ("requantise_columns", (codes, torch.rand(3, 256, device=device()).t()), True),
        ("quantise_weight", (normal(200, 336, dtype=torch.float32), True), True),
        ("quantise_weight", (normal(2, 200, 336), True), True),
        ("swiglu_quantise", (gate, up, routing), False),
        ("swiglu_backward_quantise", (normal(256, 384), gate, up, routing), False),
        ("rmsnorm_quantise", (normal(50, 336), torch.rand(336, device=device()), 1e-6), False),
        ("rope_concat", (*(normal(*shape) for shape in heads), *rotation), False),
        ("rope_concat_backward", (*(normal(*shape) for shape in gradients), *rotation), False),
    ]

    def check(name: str, inputs: tuple[Any, ...], exact: bool) -> str:
        found, wanted = (without_nan(getattr(module, name)(*inputs)) for module in (package, reference))
        return difference(found, wanted, exact)

    for name, inputs, exact in cases:
        yield attempt(name, lambda name=name, inputs=inputs, exact=exact: check(name, inputs, exact))


def without_nan(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """NaN scales as -1, which no scale is, so that equality sees them."""
    return tuple(
        tensor.nan_to_num(-1.0) if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 else tensor
        for tensor in tensors
    )


def routing() -> Iterator[Found]:
    """headrace_moe_routing at V3's 256 experts in 8 groups; scores that tie within an ulp may be chosen otherwise."""
    package = importlib.import_module("headrace_moe_routing")
    reference = importlib.import_module("headrace_moe_routing.reference")
    logits, bias = normal(300, 256, dtype=torch.float32), normal(256, dtype=torch.float32) * 0.01
    rule = (8, 4, 8, True, 2.5)

    def route() -> str:
        found, wanted = package.route(logits, bias, *rule), reference.route(logits, bias, *rule)
        same = (found.experts == wanted.experts).all(dim=1)
        if same.float().mean().item() < 0.99:
            return f"{1 - same.float().mean().item():.1%} of the tokens went to other experts"
        if not torch.allclose(found.weights[same], wanted.weights[same], rtol=1e-5):
            return "weights differ"
        counts = torch.bincount(found.experts.flatten(), minlength=256)
        ends = ((counts + 127) // 128 * 128).cumsum(0)
        right = torch.equal(found.counts.long(), counts) and torch.equal(found.offsets[1:].long(), ends)
        return "" if right else "counts or offsets do not belong to the experts chosen"

    def backward() -> str:
        leaf = logits.clone().requires_grad_()
        routed = reference.route(leaf, bias, *rule)
        dweights = torch.randn_like(routed.weights)
        (wanted,) = torch.autograd.grad(routed.weights, leaf, dweights)
        found = package.route_backward(dweights, logits, routed.experts, True, 2.5)
        return norm_wise(found, wanted, 1e-5)

    yield attempt("route", route)
    yield attempt("route_backward", backward)


def dispatch() -> Iterator[Found]:
    """The Triton kernels of headrace_dispatch; its CUDA movers have a test of their own, which gpu.py runs."""
    package = importlib.import_module("headrace_dispatch")
    reference = importlib.import_module("headrace_dispatch.reference")
    experts = torch.rand(70, 32, device=device()).topk(4, dim=1).indices.int()
    x, weights = normal(70, 336), torch.rand(70, 4, device=device())
    layout = reference.lay_out(experts, 32)
    rows = reference.permute(x, layout)

    def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str:
        equal = all(torch.equal(bits(one), bits(other)) for one, other in zip(found, wanted, strict=True))
        return "" if equal else "differs from the reference"

    def weights_of_rows() -> Tensor:
        return torch.zeros(len(rows), device=device()).index_put((layout.rows_of_token.long(),), weights)

    padded = normal(70, 384)  # the reference quantises whole tiles only
    quantised = reference.permute_quantise(padded, layout)
    unsorted = package.permute_quantise(padded, package.lay_out(torch.zeros(70, 1, device=device()).int(), 1))
    codes, scales = unsorted[0][:70].contiguous(), unsorted[1][:70]
    yield attempt(
        "lay_out", lambda: same(tuple(vars(package.lay_out(experts, 32)).values()), tuple(vars(layout).values()))
    )
    yield attempt("permute", lambda: same((package.permute(x, layout),), (rows,)))
    yield attempt("permute_quantise", lambda: same(package.permute_quantise(padded, layout), quantised))
    yield attempt("permute_quantised", lambda: same(package.permute_quantised(codes, scales, layout), quantised))
    yield attempt("permute_weights", lambda: same((package.permute_weights(weights, layout),), (weights_of_rows(),)))
    yield attempt("combine", lambda: same((package.combine(rows, layout),), (reference.combine(rows, layout),)))


def bits(tensor: Tensor) -> Tensor:
    """FP8 as bytes, which can be compared."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def products(back_end: str, product: str) -> Iterator[Found]:
    """One product of headrace_fp8_gemm by `triton` or `gluon`, and for `dense` what its accumulation loses."""
    if back_end == "gluon" and device() == "cpu":
        return
    module = importlib.import_module(f"headrace_fp8_gemm.{back_end}_gemm")
    yield attempt(f"{back_end} {product}", lambda: check_product(module, product))
    if product == "dense":
        yield attempt(f"{back_end} accumulation", lambda: check_accumulation(module))


def check_product(module: ModuleType, product: str) -> str:
    """Against float64 sums and, for Gluon, against Triton; in FP32, so that no rounding to BF16 hides anything."""
    reference = importlib.import_module("headrace_fp8_gemm.reference")
    arguments = operands(product)
    wanted = call(reference, product, arguments, sums=torch.float64)
    found = call(module, product, arguments)
    wrong = norm_wise(found, wanted, PRODUCT_ERROR)
    if wrong or not module.__name__.endswith("gluon_gemm"):
        return wrong
    triton = call(importlib.import_module("headrace_fp8_gemm.triton_gemm"), product, arguments)
    return norm_wise(found, triton, GLUON_DIFFERENCE)


def check_accumulation(module: ModuleType) -> str:
    """Positive data, long sums; see above."""
    a, b = (normal(128 if device() == "cuda" else 16, ACCUMULATION_DEPTH).abs() for _ in range(2))
    arguments = (*codes_of(a, (1, 128)), *codes_of(b, (128, 128)))
    reference = importlib.import_module("headrace_fp8_gemm.reference")
    wanted = call(reference, "dense", arguments, sums=torch.float64)
    return norm_wise(call(module, "dense", arguments), wanted, ACCUMULATION_ERROR)


def call(module: ModuleType, product: str, arguments: tuple[Tensor, ...], **options: Any) -> Tensor:
    """The product in FP32; weight gradients are written once and then added once."""
    if product != "k_grouped":
        result: Tensor = getattr(module, product)(*arguments, torch.float32, **options)
        return result
    left, right, offsets = arguments[0], arguments[2], arguments[4]
    out = torch.full((len(offsets) - 1, left.shape[0], right.shape[0]), torch.nan, device=left.device)
    module.k_grouped(*arguments, out, False, **options)
    module.k_grouped(*arguments, out, True, **options)
    return out


def operands(product: str) -> tuple[Tensor, ...]:
    """Ragged where the product allows it; experts out of order, one left out, one without rows."""
    large = device() == "cuda"
    M, N, K, E = (1100, 392, 2000, 4) if large else (100, 136, 272, 3)
    if product == "dense":
        return *codes_of(normal(M, K), (1, 128)), *codes_of(normal(N, K), (128, 128))
    if product == "m_grouped":
        groups = torch.tensor([2, 0, 0, 2] if not large else [2, 0, 0, 3, 2, 2, 3], dtype=torch.int32, device=device())
        parts = [codes_of(normal(N, K), (128, 128)) for _ in range(E)]
        weights, scales = (torch.stack([bits(part[place]) for part in parts]) for place in (0, 1))
        return *codes_of(normal(128 * len(groups), K), (1, 128)), weights.view(torch.float8_e4m3fn), scales, groups
    S = 1024 if large else 384
    offsets = torch.tensor([0, 128, 128, S // 128 * 128], dtype=torch.int32, device=device())
    return *codes_of(normal(N, S), (1, 128)), *codes_of(normal(200 if large else 72, S), (1, 128)), offsets


def codes_of(x: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """E4M3 codes and FP32 scales by the reference quantiser; scales of rows with stride 1 along them."""
    codes, scales = importlib.import_module("headrace_fp8_quantisation.reference").quantise(x, tile, False)
    return codes, scales.t().contiguous().t() if tile[0] == 1 else scales.contiguous()


def norm_wise(found: Tensor, wanted: Tensor, bound: float) -> str:
    """What is wrong with `found`: its relative distance in the Frobenius norm."""
    error = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
    return "" if error <= bound else f"off by {error:.2e} norm-wise, at most {bound:.0e} allowed"


PARTS: dict[str, tuple[Callable[[], Iterator[Found]], tuple[str, ...]]] = {
    "quantisation": (
        quantisation,
        (
            "quantise_rows", "quantise_rows_and_columns", "requantise_columns", "quantise_weight", "swiglu_quantise",
            "swiglu_backward_quantise", "rmsnorm_quantise", "rope_concat", "rope_concat_backward",
        ),
    ),
    "routing": (routing, ("route", "route_backward")),
    "dispatch": (
        dispatch, ("lay_out", "permute", "permute_quantise", "permute_quantised", "permute_weights", "combine"),
    ),
    **{
        f"{back_end} {product}": (
            lambda back_end=back_end, product=product: products(back_end, product),
            (f"{back_end} {product}", *([f"{back_end} accumulation"] if product == "dense" else [])),
        )
        for back_end in ("triton", "gluon")
        for product in PRODUCTS
    },
}  # fmt: skip
"""A part runs in a process of its own: (what to run, the kernels it must speak about)."""
