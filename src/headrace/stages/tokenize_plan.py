"""The plan of tokenize: a small JSON of its units, with what each is read from and how many tokens it will have.

python -m headrace.stages.tokenize_plan 00000 experiment=tiny
"""

from collections.abc import Iterator, Sequence

from headrace.stages.batch_names import per_job
from headrace.stages.batches import Batches, Job, run
from headrace.stages.token_units import plan_path, units_of
from headrace.tokens.plan import write_plan


def _make(job: Job, units: Sequence[str]) -> Iterator[str]:
    made = units_of(job.inputs["corpus"], job.inputs["tokenizer"], job.lock, job.config)
    write_plan(plan_path(job.place.folder), made)
    yield f"{len(made)} units"


BATCHES = Batches(
    stage="tokenize",
    program="tokenize_plan",
    per_job=lambda config: per_job("tokenize_plan", config.launch),
    units=lambda config, lock, place: ["plan"],
    finished=lambda place, unit: plan_path(place.folder).exists(),
    make=_make,
    unit_name=str,
)

if __name__ == "__main__":
    run(BATCHES)
