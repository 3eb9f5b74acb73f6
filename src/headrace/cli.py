"""`headrace runs | index | items | plan | sync | export | import`: what the pipeline needs before and after a run.

Thin: each command composes the configuration, asks one room and prints. Stages are not run from here: that is
`snakemake`, or `python -m headrace.stages.<stage>`.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.artifacts.files import read_json
from headrace.config.compose import in_hydras_words, load
from headrace.config.schema import Config
from headrace.errors import UserError
from headrace.stages.run import failed

if TYPE_CHECKING:
    from headrace.planning.describe import Simulated


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 with one line where the input is wrong."""
    arguments = _parser().parse_args(argv)
    try:
        text = _COMMANDS[arguments.command](arguments)
    except (Exception, KeyboardInterrupt) as error:
        return failed(arguments.command, error)
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace", description="Raw text to a published DeepSeek-V3-style model.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("runs", "list what is in results/: stage, fingerprint, what differs from the defaults, key figures"),
        ("index", "freeze the corpus' source files as they are now, e.g. after you changed them on purpose"),
        (
            "plan",
            "parameters, FLOPs per token, bytes and steps of a configuration, without running anything; with "
            "tokens.total=14.8e12 what tokenizing so much takes",
        ),
        ("sync", "upload offline W&B runs and replay their lineage"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. experiment=tiny model=v3_671b")
    text = "write down the items of the evaluation's tasks, so that the corpus stage seeks them in training text"
    command = commands.add_parser("items", help=text, description=text)
    command.add_argument("file", type=Path, help="the file to make, e.g. items.jsonl")
    command.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. evaluate=v3_base")
    command = commands.add_parser("export", help="a tokenized dataset as other trainers read it, in hard links")
    command.add_argument("folder", type=Path, help="a tokenize artifact, e.g. results/latest/tokenize/artifact")
    command.add_argument("output", type=Path, help="the folder to make")
    command.add_argument("--format", choices=("datatrove", "olmo", "arrow"), required=True)
    command = commands.add_parser("import", help="turn a Hub folder of this family into a checkpoint to train from")
    command.add_argument("source", help="a folder with config.json, safetensors and tokenizer.json, or a Hub id")
    command.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. paths.results=results")
    return parser


def _import(arguments: argparse.Namespace) -> str:
    from headrace.reporting.runs import IMPORTED
    from headrace.stages.imported import import_source

    folder = import_source(arguments.source, load(arguments.overrides))
    model = read_json(folder / IMPORTED)["model"]
    shape = f"{model['num_hidden_layers']} layers, {model['n_routed_experts']} experts"
    return f"{folder}: {shape}; train.from={folder.name}@0 goes on from it"


def _export(arguments: argparse.Namespace) -> str:
    from headrace.tokens.export import export

    made = export(arguments.folder, arguments.output, arguments.format)
    return f"{arguments.output}: {made.documents:,} documents, {made.tokens:,} tokens\n{made.how_to_read}"


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


def _items(arguments: argparse.Namespace) -> str:
    from headrace.corpus.contamination import Items
    from headrace.corpus.item_files import write_items
    from headrace.evaluation.item_texts import item_texts

    config = load(arguments.overrides)
    if not arguments.file.parent.is_dir():  # said before anything is downloaded
        raise UserError(f"{arguments.file}: no such folder as {arguments.file.parent}; make it first")
    items, absent = item_texts(config.evaluate)
    if not items:
        raise UserError("none of the evaluation's tasks has items: " + "; ".join(map(": ".join, absent.items())))
    rows = [
        (task, f"{counts['items']:,} items" + (f", {counts['unchecked']:,} too short" if counts["unchecked"] else ""))
        for task, counts in Items(items).by_task().items()
    ]
    file = write_items(arguments.file, items)
    setting = f"corpus.contamination_items={{path: {in_hydras_words(file.path)}, sha256: {file.sha256}}}"
    return "\n".join([*(f"{task}: {said}" for task, said in [*rows, *absent.items()]), shlex.quote(f"set={setting}")])


def _plan(arguments: argparse.Namespace) -> str:
    from headrace.config.phases import MAIN, layout_of
    from headrace.conversion.export import exported_bytes
    from headrace.planning.describe import layout, phase_layout, plan, text_table
    from headrace.recipe.schedule import Schedule

    config = load(arguments.overrides)
    if config.tokens.total:
        return text_table(_dataset(config, config.tokens.total))
    rows = plan(config, exported_bytes(config.model, config.convert.dtype, config.convert.unaligned))
    for phase in sorted(Schedule(config.recipe).phases, key=lambda phase: phase.name != MAIN):
        parallel = layout_of(config.parallel, phase.name)
        if parallel.pipeline * parallel.data > 1:
            least, most = _simulated(config, phase.name)
            rows += layout(config, most) if phase.name == MAIN else [phase_layout(config, phase, least, most)]
    return text_table(rows)


def _dataset(config: Config, total: int) -> list[tuple[str, str]]:
    """What tokenizing takes, at the speed of this configuration's tokenizer on a sample of its corpus, if made."""
    from headrace.corpus.sources import known_lock, lock_path
    from headrace.planning.dataset import dataset_rows, measure
    from headrace.stages.places import places

    speed = None
    if lock_path(config).exists():  # or else nothing is made, and asking for the lock would make one
        found = places(config, known_lock(config).hash)
        corpus, tokenizer = found["corpus"].artifact, found["tokenizer"].artifact
        if corpus.exists() and tokenizer.exists():
            speed = measure(corpus, tokenizer, config)
    return dataset_rows(config, total, speed)


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


_COMMANDS = {
    "runs": _runs,
    "index": _index,
    "items": _items,
    "plan": _plan,
    "sync": _sync,
    "export": _export,
    "import": _import,
}

if __name__ == "__main__":
    sys.exit(main())
