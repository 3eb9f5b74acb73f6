"""ablations: the paper's comparisons at demo size, trained, evaluated and compared in one go. Not a stage.

    python -m headrace.stages.ablations [key=value ...]
    snakemake --config experiment=ablations [set="recipe.tokens=1e6"]

MTP or none (report, section 4.5.1), balancing by bias or by an auxiliary loss (4.5.2), experts or a dense twin, Muon or
AdamW: each is `conf/experiment/ablations_<name>.yaml`, which differs from `ablations` by that alone; text, rows, seeds,
budget and items are the same. Stages that are finished are passed over, so a stop costs what was at work. What follows
is `compare` of the five, whatever it finds.

`snakemake ablations` is the same. `experiment=ablations` names the baseline among them and may be said here, too; for
any other program and target, as in `snakemake all --config experiment=ablations`, it is a run like any other.
"""

import subprocess
import sys
from collections.abc import Sequence

from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.errors import UserError
from headrace.stages.attempts import RUN_AGAIN
from headrace.stages.compare import TABLE, write
from headrace.stages.places import places
from headrace.stages.run import failed
from headrace.stages.table import STAGES, stage_named

BASELINE = "ablations"
EXPERIMENTS = (BASELINE, *(f"{BASELINE}_{name}" for name in ("no_mtp", "aux_loss", "dense", "adamw")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run and compare all of them; other words are Hydra overrides of each. Returns the first failing exit code."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != f"experiment={BASELINE}"]
    try:
        if named := [word for word in words if word.startswith("experiment=")]:
            raise UserError(
                f"{named[0]}: `snakemake ablations` trains experiments of its own ({', '.join(EXPERIMENTS)}); leave it "
                'out, and change values by set="key=value"'
            )
        for experiment in EXPERIMENTS:
            if code := _evaluated([f"experiment={experiment}", *words]):
                return code
        config = load([f"experiment={BASELINE}", *words])
        folder = write(config, [_fingerprint([f"experiment={experiment}", *words]) for experiment in EXPERIMENTS])
    except (Exception, KeyboardInterrupt) as error:
        return failed("ablations", error)
    print((folder / TABLE).read_text(encoding="utf-8"))
    print(folder / TABLE, file=sys.stderr)
    return 0


def stages_before_comparing() -> list[str]:
    """Evaluate and all that it reads, in the order in which they can run."""
    last = stage_named("evaluate")
    return [stage.name for stage in STAGES if stage.name in (*last.parents, last.name)]


def _evaluated(words: Sequence[str]) -> int:
    """One experiment up to its evaluation; a stage that ends with "run me again" is run again."""
    for stage in stages_before_comparing():
        code = RUN_AGAIN
        while code == RUN_AGAIN:
            code = subprocess.run([sys.executable, "-m", f"headrace.stages.{stage}", *words]).returncode
        if code:
            return code
    return 0


def _fingerprint(words: Sequence[str]) -> str:
    config = load(words)
    return places(config, known_lock(config).hash)["evaluate"].fingerprint


if __name__ == "__main__":
    sys.exit(main())
