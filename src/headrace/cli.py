"""`headrace runs | index | plan | sync | import`: results, frozen sources, figures of a plan, W&B upload, Hub folders.

Thin: each command composes the configuration, asks one room and prints. Stages are not run from here: that is
`snakemake`, or `python -m headrace.stages.<stage>`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.config.compose import load
from headrace.config.schema import Config
from headrace.errors import UserError

if TYPE_CHECKING:
    from headrace.planning.describe import Simulated


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 with one line where the input is wrong."""
    arguments = _parser().parse_args(argv)
    try:
        commands = {"runs": _runs, "index": _index, "plan": _plan, "sync": _sync, "import": _import}
        text = commands[arguments.command](arguments)
    except UserError as error:
        print(f"headrace {arguments.command}: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace", description="Raw text to a published DeepSeek-V3-style model.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("runs", "list what is in results/: stage, fingerprint, what differs from the defaults, key figures"),
        ("index", "freeze the corpus' source files as they are now, e.g. after you changed them on purpose"),
        ("plan", "parameters, FLOPs per token, bytes and steps of a configuration, without running anything"),
        ("sync", "upload offline W&B runs and replay their lineage"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. experiment=tiny model=v3_671b")
    command = commands.add_parser("import", help="turn a Hub folder of this family into a checkpoint's tensors")
    command.add_argument("folder", type=Path, help="config.json, safetensors and their index")
    command.add_argument("output", type=Path, help="the safetensors file to write")
    return parser


def _import(arguments: argparse.Namespace) -> str:
    from headrace.conversion.import_hub import import_

    config = import_(arguments.folder, arguments.output)
    return f"{arguments.output}: {config.num_hidden_layers} layers, {config.n_routed_experts} experts"


def _runs(arguments: argparse.Namespace) -> str:
    from headrace.reporting.runs import table

    return table(Path(load(arguments.overrides).paths.results))


def _index(arguments: argparse.Namespace) -> str:
    from headrace.corpus.lock import index
    from headrace.corpus.sources import lock_path

    config = load(arguments.overrides)
    path = lock_path(config)
    lock = index(config.corpus, path)
    size = sum(source.size for source in lock.files)
    return f"{path}: {len(lock.files):,} files, {size / 1e6:,.1f} MB, {lock.hash}"


def _plan(arguments: argparse.Namespace) -> str:
    from headrace.config.phases import MAIN, layout_of
    from headrace.conversion.export import exported_bytes
    from headrace.planning.describe import layout, phase_layout, plan, text_table
    from headrace.recipe.schedule import Schedule

    config = load(arguments.overrides)
    rows = plan(config, exported_bytes(config.model, config.convert.dtype, config.convert.unaligned))
    for phase in sorted(Schedule(config.recipe).phases, key=lambda phase: phase.name != MAIN):
        parallel = layout_of(config.parallel, phase.name)
        if parallel.pipeline * parallel.data > 1:
            least, most = _simulated(config, phase.name)
            rows += layout(config, most) if phase.name == MAIN else [phase_layout(config, phase, least, most)]
    return text_table(rows)


def _simulated(config: Config, phase: str) -> "tuple[Simulated, Simulated]":
    """A phase's smallest and largest step on paper, a rank's forward of a microbatch taking 1 whatever its stages."""
    from headrace.config.phases import layout_of
    from headrace.pipeline.engine import microbatches_of, schedule_of
    from headrace.pipeline.generators import generate
    from headrace.pipeline.simulate import Costs, simulate
    from headrace.planning.describe import Simulated

    name, reason = schedule_of(config, phase)

    def on_paper(microbatches: int) -> Simulated:
        schedule = generate(name, layout_of(config.parallel, phase).pipeline, microbatches)
        part = schedule.ranks / schedule.stages
        found = simulate(schedule, Costs(forward=part, backward=2 * part, input=part, weight=part))
        return Simulated(
            name,
            reason,
            microbatches,
            found.makespan,
            max(found.idle),
            max(found.live_activations),
            max(found.receive_buffers),
        )

    numbers = microbatches_of(config, phase)
    return on_paper(numbers[0]), on_paper(numbers[-1])


def _sync(arguments: argparse.Namespace) -> str:
    from headrace.tracking.sync import sync

    done = sync(Path(load(arguments.overrides).paths.results), log=logging.getLogger("headrace"))
    text = f"{done.runs} runs, {done.uploaded} uploaded, {done.linked} inputs linked"
    if done.failed:
        raise UserError(f"{text}, {done.failed} failed (see above); run it again")
    return text


if __name__ == "__main__":
    sys.exit(main())
