"""`headrace plan`: what a configuration will train, compute and store, as a short table.

Every row is computed by this room's formulas and the recipe's schedule; nothing is measured. What the pipeline's
simulator says of a layout is handed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.config.phases import MAIN, layout_of, microbatch_of
from headrace.config.schema import Config
from headrace.planning.flops import training_flops
from headrace.planning.parameters import ParameterCount, count, muon_parameters
from headrace.planning.reliability import expectation, machines_of
from headrace.recipe.schedule import Phase, Schedule

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
    counted, length, schedule = count(config.model), config.recipe.sequence_length, Schedule(config.recipe)
    rows = [
        ("parameters", _exact(counted.total)),
        ("activated per token", f"{_exact(counted.activated)}, with the head, without the embedding"),
        ("router bias entries", f"{counted.router_bias:,}"),
    ]
    if has_mtp := bool(config.model.num_nextn_predict_layers):
        rows.append(("MTP module", f"{_exact(counted.mtp)}, embedding and head shared"))
    rows.append(
        ("FLOPs per token", f"{scaled(training_flops(config.model, length))} causal at {length:,} tokens, without MTP")
    )
    if has_mtp:
        rows.append(("FLOPs per token with MTP", f"{scaled(_flops(config, length))} causal"))
    return [
        *rows,
        ("training tokens", _exact(schedule.tokens_after(schedule.steps))),
        ("steps", f"{schedule.steps:,} of {config.recipe.batch_sequences:,} x {length:,} tokens at full batch"),
        *((f"  {phase.name}", _phase(schedule, phase)) for phase in schedule.phases if len(schedule.phases) > 1),
        ("FLOPs of the run", f"{scaled(run_flops(config))}, forward and backward"),
        ("weights in a checkpoint", f"{scaled(4 * counted.stored)}B in FP32"),
        ("moments in a checkpoint", f"{scaled(optimizer_bytes(config, counted))}B, {config.recipe.optimizer.name}"),
        ("exported model", f"{scaled(exported_bytes)}B in {config.convert.dtype.upper()}"),
    ]


def run_flops(config: Config, steps: int | None = None) -> float:
    """Model FLOPs of the run's first `steps` steps, forward and backward; None: of all.

    Attention costs more in phases of longer rows.
    """
    schedule, total = Schedule(config.recipe), 0.0
    end = schedule.steps if steps is None else steps
    for phase in schedule.phases:
        tokens = schedule.tokens_before(min(phase.end, end)) - schedule.tokens_before(min(phase.first, end))
        total += tokens * _flops(config, phase.sequence_length)
    return total


def _flops(config: Config, length: int) -> float:
    return training_flops(config.model, length, mtp=bool(config.model.num_nextn_predict_layers))


def _tokens(schedule: Schedule, phase: Phase) -> int:
    return schedule.tokens_before(phase.end) - schedule.tokens_before(phase.first)


def _phase(schedule: Schedule, phase: Phase) -> str:
    least, most = phase.sequences_least, phase.sequences_most
    sequences = _range(f"{least:,}", f"{most:,}")
    yarn = f", YaRN factor {phase.rope_scaling.factor:g}" if phase.rope_scaling else ""
    tokens = f"{scaled(_tokens(schedule, phase)).strip()} tokens"
    return f"{phase.end - phase.first:,} of {sequences} x {phase.sequence_length:,} tokens{yarn}, {tokens}"


def optimizer_bytes(config: Config, counted: ParameterCount) -> int:
    """Bytes of the optimizer's moments: two per weight, one for what Muon takes."""
    size = {"bf16": 2, "fp32": 4}[config.precision.optimizer_moments]
    single = muon_parameters(config.model) if config.recipe.optimizer.name == "muon" else 0
    return size * (2 * (counted.total + counted.mtp) - single)


def layout(config: Config, simulated: Simulated) -> list[tuple[str, str]]:
    """Rows for a layout of several ranks in the phase main, the most of any rank."""
    parallel, dtype = layout_of(config.parallel, MAIN), config.precision.compute
    rows = microbatch_of(parallel, config.recipe.batch_sequences // parallel.data)
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
        expectation(machines_of(parallel), config.checkpoint.faults_per_day),
    ]


def phase_layout(config: Config, phase: Phase, least: Simulated, most: Simulated) -> tuple[str, str]:
    """One row for another phase than main: its layout, and how idle its ranks are in its smallest and largest step."""
    parallel = layout_of(config.parallel, phase.name)
    rows = microbatch_of(parallel, phase.sequences_most // parallel.data)
    microbatches = _range(*(f"{part.microbatches}" for part in (least, most)))
    idle = _range(*(f"{100 * part.idle / part.makespan:.1f} %" for part in (least, most)))
    return (
        f"  {phase.name}",
        f"pipeline {parallel.pipeline} x data {parallel.data}, expert {parallel.expert}, {least.schedule}: "
        f"{microbatches} microbatches of {rows} x {phase.sequence_length:,} tokens, idle {idle}",
    )


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


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
