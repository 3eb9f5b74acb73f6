"""evaluate: the converted model measured on held-out text and local tasks, beside its baselines."""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import read_json
from headrace.evaluation.evaluate import Inputs, evaluate
from headrace.fp8.numerics import Numerics
from headrace.launch.device import resolve, use_threads
from headrace.model.loss import inputs_of
from headrace.recipe.schedule import Schedule
from headrace.stages import convert, provenance
from headrace.stages.run import Door, Outcome, Run, main
from headrace.tokens.loader import TokenDataset
from headrace.training.rows import training_batches


def body(run: Run) -> Outcome:
    """Judge agreement, score held-out text, run the tasks, generate samples."""
    config = run.config
    device = resolve(config.launch.device)
    use_threads(config.launch.threads)
    tokens = run.input("tokenize", quick=True)

    inputs = Inputs(
        hub_folder=run.input("convert"),
        checkpoint=convert.checkpoint(run),
        agreement_file=run.input("pretrain") / "agreement.safetensors",
        heldout=run.input("corpus") / "heldout.parquet",
        tokenizer_folder=run.input("tokenizer"),
        training_rows=lambda: training_rows(run, tokens),
        identity=dict(run.inputs),
        kind=convert.kind(run),
        final=_is_what_was_in_memory(run) and _trained_on_such_a_machine(run, device.type),
    )
    results = evaluate(
        inputs,
        config.evaluate,
        convert.network(run),
        config.recipe.sequence_length,
        Numerics.resolve(config.precision, device),
        config.convert.dtype,
        run.output,
        run.log.info,
        seed=config.seed.init,
        device=str(device),
    )
    scores = {name: entry["value"] for name, entry in results["bits_per_byte"]["kinds"]["all"]["models"].items()}
    line = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    return Outcome(f"bits per byte: {line}", {"bits_per_byte": scores.pop("model"), **scores})


def training_rows(run: Run, tokens: Path) -> NDArray[np.integer]:
    """int64 [R, L + 1], L = recipe.sequence_length: exactly the rows that the model has seen, `train.from`'s included.

    Longer rows of context extension are cut into rows of L + 1; what is left at their ends is not used.
    """
    dataset, length = TokenDataset(tokens), run.config.recipe.sequence_length
    seen = []
    for own, rows in rows_read(run).items():
        read = inputs_of(training_batches(dataset, run.config, own, 1).batch(0, rows)).numpy()
        seen += [read[:, start : start + length + 1] for start in range(0, own - length + 1, length)]
    return np.concatenate(seen)


def rows_read(run: Run) -> dict[int, int]:
    """How many rows of each length the model has seen: each length has an order of its own, read from its beginning."""
    state, schedule = convert.trained_state(run), Schedule(run.config.recipe)
    rows = {run.config.recipe.sequence_length: int(state["position"])}
    for phase in schedule.phases:
        if phase.sequence_length != run.config.recipe.sequence_length and phase.first < state["step"]:
            last = schedule.at(min(phase.end, state["step"]) - 1)
            rows[phase.sequence_length] = last.position + last.sequences
    return rows


def _is_what_was_in_memory(run: Run) -> bool:
    """Whether what was converted are the weights that training ended with, of which it left results."""
    chosen = run.config.convert
    if chosen.step is None and chosen.weights == "final":
        return True
    run.log.warning(
        "convert.step=%s, convert.weights=%s: in-memory results are the last weights' and are not compared",
        "null" if chosen.step is None else chosen.step,
        chosen.weights,
    )
    return False


def _trained_on_such_a_machine(run: Run, device: str) -> bool:
    """BF16 results are bitwise the same only on the same kind of processor; elsewhere the comparison is left out."""
    trained = read_json(run.parents["pretrain"].folder / "provenance.json")["machine"]["processor"]
    trained_device = read_json(run.input("pretrain") / "training.json")["device"]
    here = (provenance.machine()["processor"], device)
    if (trained, trained_device) != here:
        run.log.warning(
            "trained on %s, evaluated on %s: in-memory results are not compared", (trained, trained_device), here
        )
    return (trained, trained_device) == here


DOOR = Door("evaluate", body)

if __name__ == "__main__":
    sys.exit(main(DOOR))
