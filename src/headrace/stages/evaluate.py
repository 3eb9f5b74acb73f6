"""evaluate: the converted model measured on held-out text and local tasks, beside its baselines."""

import sys

import numpy as np
from numpy.typing import NDArray

from headrace.artifacts.files import read_json
from headrace.evaluation.evaluate import Inputs, evaluate
from headrace.launch.device import resolve, use_threads
from headrace.stages.convert import model_file
from headrace.stages.run import Door, Outcome, Run, main
from headrace.tokens.loader import Batches, TokenDataset


def body(run: Run) -> Outcome:
    """Judge agreement, score held-out text, run the tasks, generate samples."""
    config = run.config
    device = resolve(config.launch.device)
    use_threads(config.launch.threads)
    tokens = run.input("tokenize", quick=True)

    def rows_seen() -> NDArray[np.integer]:
        """int64 [R, L + 1]: exactly the rows that the model has seen, those of `train.from` included."""
        rows = read_json(run.input("pretrain") / "training.json")["position"]
        train = TokenDataset(tokens).split("train")
        return Batches(train, config.seed.data, config.recipe.sequence_length, 1).batch(0, rows).numpy()

    inputs = Inputs(
        hub_folder=run.input("convert"),
        checkpoint_model_file=model_file(run),
        agreement_file=run.input("pretrain") / "agreement.safetensors",
        heldout=run.input("corpus") / "heldout.parquet",
        tokenizer_folder=run.input("tokenizer"),
        training_rows=rows_seen,
        identity=dict(run.inputs),
        final=config.convert.step is None,
    )
    results = evaluate(
        inputs,
        config.evaluate,
        config.model,
        config.recipe.sequence_length,
        config.precision.compute,
        config.convert.dtype,
        run.output,
        run.log.info,
        seed=config.seed.init,
        device=str(device),
    )
    scores = {name: entry["value"] for name, entry in results["bits_per_byte"]["kinds"]["all"]["models"].items()}
    line = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    return Outcome(f"bits per byte: {line}", {"bits_per_byte": scores.pop("model"), **scores})


DOOR = Door("evaluate", body)

if __name__ == "__main__":
    sys.exit(main(DOOR))
