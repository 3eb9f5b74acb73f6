"""evaluate: the converted model measured on held-out text and local tasks, beside its baselines."""

import sys

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import read_json
from headrace.evaluation.evaluate import Inputs, evaluate
from headrace.fp8.numerics import Numerics
from headrace.launch.device import resolve, use_threads
from headrace.stages import provenance
from headrace.stages.convert import model_file, trained_state
from headrace.stages.run import Door, Outcome, Run, main
from headrace.tokens.loader import Batches, TokenDataset


def body(run: Run) -> Outcome:
    """Judge agreement, score held-out text, run the tasks, generate samples."""
    config = run.config
    device = resolve(config.launch.device)
    use_threads(config.launch.threads)
    tokens = run.input("tokenize", quick=True)

    def training_rows() -> NDArray[np.integer]:
        """int64 [R, L + 1]: exactly the rows that the model has seen, those of `train.from` included."""
        train = TokenDataset(tokens).split("train")
        batches = Batches(train, config.seed.data, config.recipe.sequence_length, 1)
        return batches.batch(0, trained_state(run)["position"]).numpy()

    inputs = Inputs(
        hub_folder=run.input("convert"),
        checkpoint_model_file=model_file(run),
        agreement_file=run.input("pretrain") / "agreement.safetensors",
        heldout=run.input("corpus") / "heldout.parquet",
        tokenizer_folder=run.input("tokenizer"),
        training_rows=training_rows,
        identity=dict(run.inputs),
        final=config.convert.step is None and _trained_on_such_a_machine(run, device.type),
    )
    results = evaluate(
        inputs,
        config.evaluate,
        config.model,
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
