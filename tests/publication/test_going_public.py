"""Making a repository public is a command of its own, which docs/publication.md names: that very line is run here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.publication.hub import push
from headrace.publication.repository import build_repository
from project import ROOT
from publication.publication_fixtures import card_facts, model_folder

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own uploads


def test_the_command_of_the_docs_makes_it_public_and_nothing_else_does(hub, tmp_path):
    repo_id = "you/your-model"
    (command,) = re.findall(r"`(hf repos settings [^`]+)`", (ROOT / "docs" / "publication.md").read_text())
    assert repo_id in command.split()
    model = model_folder(tmp_path / "model")
    build_repository(tmp_path / "tree", model, card_facts())
    push(tmp_path / "tree", repo_id, private=True, message="Publish", endpoint=hub.url)
    repository = hub.repositories[repo_id]
    before = dict(repository.tags), dict(repository.branches)
    assert repository.private
    push(tmp_path / "tree", repo_id, private=False, message="Publish", endpoint=hub.url)
    assert repository.private, "publish.private=false is no permission to make it public"

    hub.requests.clear()
    program, *words = command.split()
    environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "home")}
    found = Path(sys.executable).with_name(program)
    done = subprocess.run([found, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [request for request in hub.requests if not request.startswith("GET")] == [
        f"PUT /api/models/{repo_id}/settings"
    ]
    assert not repository.private and (dict(repository.tags), dict(repository.branches)) == before
