"""From snakemake to the Hub and back: the publish stage against a server that speaks the Hub's API."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from loopback_hub import LoopbackHub
from project import ROOT, STAGES, Project, copy_of

pytestmark = pytest.mark.workflow

LOGITS = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2]).eval()
print(json.dumps(model(torch.arange(1, 30)[None]).logits.double().flatten().tolist()))
"""


def test_a_pushed_model_is_private_tagged_and_loads_from_the_hub_with_equal_logits(
    tiny: Project, tmp_path: Path
) -> None:
    project = copy_of(tiny, tmp_path / "project", STAGES[:-2])
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home")}
        publish = project.command("publish", settings="publish.repo_id=me/tiny")
        result = subprocess.run(publish, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
        assert result.returncode == 0, result.stderr
        published = json.loads((project.place("publish") / "artifact" / "publication.json").read_text())
        assert published["repo_id"] == "me/tiny"
        assert published["private"] is True
        load = [sys.executable, "-c", LOGITS, "me/tiny", published["tag"]]
        loaded = subprocess.run(load, capture_output=True, text=True, timeout=120, env=environment)
        assert loaded.returncode == 0, loaded.stderr
    local = transformers.AutoModelForCausalLM.from_pretrained(tiny.place("convert") / "artifact").eval()
    expected = local(torch.arange(1, 30)[None]).logits.double().flatten()
    assert torch.equal(torch.tensor(json.loads(loaded.stdout.splitlines()[-1]), dtype=torch.float64), expected)
