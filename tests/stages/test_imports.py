"""What a stage does not use it does not wait for: torch takes two seconds to import, transformers three more."""

import subprocess
import sys

import pytest

DATA = ("corpus", "corpus_scans", "tokenizer", "tokenize_plan", "tokenize_shards", "tokenize")


@pytest.mark.parametrize(
    ("stages", "unused"),
    [((*DATA, "graph"), "torch"), (("pretrain", "convert", "publish", "report", "compare"), "transformers")],
)
def test_stages_start_without(stages: tuple[str, ...], unused: str) -> None:
    imports = "".join(f"import headrace.stages.{stage}\n" for stage in stages)
    told = f"{imports}import sys\nprint({unused!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"
