"""`headrace plan`: what a configuration will train, compute and store, as a short table.

Every row is computed by this room's formulas and the recipe's schedule; nothing is measured. What the pipeline's
simulator says of a layout is handed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.config.schema import Config
from headrace.planning.flops import training_flops
from headrace.planning.parameters import ParameterCount, count, muon_parameters
from headrace.recipe.schedule import Schedule

_SCALES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Simulated:
    """What the pipeline's simulator says of a layout, with F = 1, B = 2, W = 1 and F&B = 3 for a rank's share."""

    schedule: str
    reason: str
    microbatches: int
    makespan: float  # in F
    idle: float  # of the rank that idles most, in F
    live_activations: int  # at the peak, of one stage and one microbatch each
    receive_buffers: int  # at the peak, of a microbatch's hidden states each


def plan(config: Config, exported_bytes: int) -> list[tuple[str, str]]:
    """Rows (label, value) for one configuration; `exported_bytes` are those of its Hub folder's tensors."""
    counted, length = count(config.model), config.recipe.sequence_length
    has_mtp = bool(config.model.num_nextn_predict_layers)
    per_token = training_flops(config.model, length, mtp=has_mtp)
    steps = Schedule(config.recipe).steps
    tokens = Schedule(config.recipe).tokens_after(steps)
    rows = [
        ("parameters", _exact(counted.total)),
        ("activated per token", f"{_exact(counted.activated)}, with the head, without the embedding"),
        ("router bias entries", f"{counted.router_bias:,}"),
    ]
    if has_mtp:
        rows.append(("MTP module", f"{_exact(counted.mtp)}, embedding and head shared"))
    rows.append(
        ("FLOPs per token", f"{scaled(training_flops(config.model, length))} causal at {length:,} tokens, without MTP")
    )
    if has_mtp:
        rows.append(("FLOPs per token with MTP", f"{scaled(per_token)} causal"))
    return [
        *rows,
        ("training tokens", _exact(tokens)),
        ("steps", f"{steps:,} of {config.recipe.batch_sequences:,} x {length:,} tokens at full batch"),
        ("FLOPs of the run", f"{scaled(tokens * per_token)}, forward and backward"),
        ("model file of a checkpoint", f"{scaled(4 * counted.stored)}B in FP32"),
        ("its optimizer file", f"{scaled(optimizer_bytes(config, counted))}B, {config.recipe.optimizer.name}"),
        ("exported model", f"{scaled(exported_bytes)}B in {config.convert.dtype.upper()}"),
    ]


def optimizer_bytes(config: Config, counted: ParameterCount) -> int:
    """Bytes of the optimizer's moments: two per weight, one for what Muon takes."""
    size = {"bf16": 2, "fp32": 4}[config.precision.optimizer_moments]
    single = muon_parameters(config.model) if config.recipe.optimizer.name == "muon" else 0
    return size * (2 * (counted.total + counted.mtp) - single)


def layout(config: Config, simulated: Simulated) -> list[tuple[str, str]]:
    """Rows for a layout of several ranks, the most of any rank."""
    parallel, dtype = config.parallel, config.precision.compute
    rows = parallel.microbatch or config.recipe.batch_sequences // parallel.data
    hidden = rows * config.recipe.sequence_length * config.model.hidden_size * {"bf16": 2, "fp32": 4}[dtype]
    shared = f", experts shared out over {parallel.expert} of these" if parallel.expert > 1 else ""
    return [
        (
            "ranks",
            f"{parallel.pipeline * parallel.data:,} = pipeline {parallel.pipeline} x data {parallel.data}{shared}",
        ),
        ("pipeline schedule", f"{simulated.schedule}: {simulated.reason}"),
        ("microbatches", f"{simulated.microbatches} of {rows} x {config.recipe.sequence_length:,} tokens"),
        (
            "idle share",
            f"{100 * simulated.idle / simulated.makespan:.1f} %, {simulated.idle:g} F of {simulated.makespan:g} F "
            "(simulated: B = 2 F, W = F, F&B = 3 F, no communication)",
        ),
        ("activations at the peak", f"{simulated.live_activations}, of one microbatch on one stage each"),
        (
            "receive buffers",
            f"{simulated.receive_buffers} of {scaled(hidden)}B in {dtype.upper()}, "
            f"{scaled(simulated.receive_buffers * hidden)}B",
        ),
    ]


def text_table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows as text, labels aligned."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def scaled(number: float) -> str:
    """A number in four digits with its decimal prefix: 250.4 G."""
    for scale, prefix in _SCALES:
        if number >= scale:
            return f"{number / scale:.4g} {prefix}"
    return f"{number:.4g} "


def _exact(number: int) -> str:
    """A count with its digits and, from a million on, its size in billions or millions."""
    if number < 1_000_000:
        return f"{number:,}"
    size = f"{number / 1e9:.2f}B" if number >= 1_000_000_000 else f"{number / 1e6:.2f}M"
    return f"{number:,} ({size})"
