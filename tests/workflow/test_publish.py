"""From snakemake to the Hub and back: the publish stage against a server that speaks the Hub's API."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from headrace.config.compose import load
from headrace.stages.report import _publication
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
        publish = project.command(
            "publish", settings="publish.repo_id=me/tiny publish.kernels=me publish.push=true publish.allow_dirty=true"
        )
        result = subprocess.run(publish, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
        assert result.returncode == 0, result.stderr
        published = json.loads((project.place("publish") / "artifact" / "publication.json").read_text())
        assert published["repo_id"] == "me/tiny"
        assert published["private"] is True
        assert {one["repo_id"]: one["commit"] for one in published["kernels"]} == {
            name.removeprefix("kernels/"): remote.branches["v1"]
            for name, remote in hub.repositories.items()
            if name.startswith("kernels/me/headrace-") and remote.private
        }
        assert set(published["files"]) == set(hub.repositories["me/tiny"].commits[published["commit"]]) - {
            ".gitattributes"
        }
        load = [sys.executable, "-c", LOGITS, "me/tiny", published["tag"]]
        loaded = subprocess.run(load, capture_output=True, text=True, timeout=120, env=environment)
        assert loaded.returncode == 0, loaded.stderr
    local = transformers.AutoModelForCausalLM.from_pretrained(tiny.place("convert") / "artifact").eval()
    expected = local(torch.arange(1, 30)[None]).logits.double().flatten()
    assert torch.equal(torch.tensor(json.loads(loaded.stdout.splitlines()[-1]), dtype=torch.float64), expected)


def test_without_a_repository_the_kernels_folders_lie_beside_the_models_and_the_report_counts_the_model(
    tiny: Project, tmp_path: Path
) -> None:
    project = copy_of(tiny, tmp_path / "project", STAGES[:-2])
    result = project.run("publish", settings="publish.kernels=my-org publish.title=/secret/Model")
    assert result.returncode == 0, result.stderr
    assert "local folder; 4 kernel repositories of my-org" in result.stderr
    artifact = project.place("publish") / "artifact"
    published = json.loads((artifact / "publication.json").read_text())
    assert [published["repo_id"], published["commit"], published["tag"]] == [None, None, None]
    assert {(one["repo_id"], one["branch"], one["commit"], one["tag"]) for one in published["kernels"]} == {
        (f"my-org/{folder.name}", "v1", None, None) for folder in (artifact / "kernels").iterdir()
    }
    assert len(published["kernels"]) == 4
    (command,) = re.findall(r"```bash\n(.*?)\n```", (artifact / "repository" / "README.md").read_text(), re.DOTALL)
    assert "publish.title=Model" in command and "/" not in command, "no folder of this machine"
    shown = _publication(artifact, load(["experiment=tiny"]))
    assert (shown.repository, shown.files) == (None, len(published["files"]))
