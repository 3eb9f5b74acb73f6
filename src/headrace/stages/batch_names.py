"""Which batches there are. Apart from `batches`, because the Snakefile asks and must import nothing heavy."""

from headrace.config.schema import LaunchConfig

EXTRA_SHARDS = 2
"""Token shards beside those of the training split: of validation and of held-out text."""


def per_job(program: str, launch: LaunchConfig) -> int:
    """How many units one job of a program takes."""
    return {"corpus_scans": launch.pieces_per_job, "tokenize_shards": launch.shards_per_job}.get(program, 1)


def batch_folder(program: str, size: int) -> str:
    """Where the files of a program's jobs lie in the stage's run directory.

    Batch 3 of 10 units is not batch 3 of 100: where the size changed, none of the old batches is taken for a new one.
    """
    return f"{program}.{size}.batches"


def batch_names(units: int, per_job: int) -> list[str]:
    """The batches of so many units."""
    return [f"{index:05d}" for index in range(-(-units // per_job))]
