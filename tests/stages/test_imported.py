"""`headrace import` that is killed goes on behind the files it has finished, to the same bytes."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conversion_models import checkpoint_of, reference_model, tiny_model, tokenizer_folder
from headrace.artifacts.files import read_json
from headrace.checkpoint import weights_only
from headrace.checkpoint.reader import at_step
from headrace.config.compose import load
from headrace.conversion.export import export
from headrace.errors import UserError
from headrace.stages.imported import import_source
from headrace.stages.provenance import code_version

KILLED = """
import os, signal, sys
from headrace.checkpoint import weights_only
from headrace.config.compose import load
from headrace.stages.imported import import_source

write, files = weights_only.write_planned, []

def dying(path, plan, data):
    files.append(path)
    if len(files) == 3:
        path.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, plan, data)

weights_only.write_planned = dying
import_source(sys.argv[1], load(sys.argv[2:]))
"""


@pytest.fixture(name="hub", scope="module")
def _hub(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("import"), tiny_model()
    checkpoint_of(reference_model(config), config, folder / "model.safetensors")
    export(
        folder / "model.safetensors", config, tokenizer_folder(folder / "tokenizer"), folder / "hub", "bf16", 400_000
    )
    return folder / "hub"


def settings(folder: Path) -> list[str]:
    return [f"paths.results={folder}", "convert.max_shard_bytes=150000"]


def files_of(imported: Path) -> dict[str, bytes]:
    """All but the lease of whoever was at work."""
    found = {path.relative_to(imported).as_posix(): path for path in imported.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("lease")}


def test_an_import_that_was_killed_goes_on(hub, tmp_path, monkeypatch):
    undisturbed = files_of(import_source(str(hub), load(settings(tmp_path / "whole"))))
    words = settings(tmp_path / "killed")
    died = subprocess.run([sys.executable, "-c", KILLED, str(hub), *words], capture_output=True, text=True, timeout=200)
    assert died.returncode == -signal.SIGKILL, died.stderr
    made, write = [], weights_only.write_planned
    monkeypatch.setattr(weights_only, "write_planned", lambda path, *rest: made.append(path.name) or write(path, *rest))
    imported = import_source(str(hub), load(words))
    files = sorted(path.name for path in imported.glob("checkpoints/step-00000000/*.safetensors"))
    assert len(files) > 5 and made == files[2:]
    assert files_of(imported) == undisturbed
    made.clear()
    assert import_source(str(hub), load(words)) == imported and made == []
    at_step(imported / "checkpoints", 0)
    assert read_json(imported / "provenance.json")["code"] == code_version()


def test_one_that_was_killed_when_all_was_written_is_ended(hub, tmp_path):
    imported = import_source(str(hub), load(settings(tmp_path)))
    undisturbed = files_of(imported)
    for name in ("imported.json", "stage.json"):
        (imported / name).unlink()
    (imported / "checkpoints" / ".unfinished-records-0123").mkdir()
    assert import_source(str(hub), load(settings(tmp_path))) == imported
    assert files_of(imported) == undisturbed
    assert [path.name for path in (imported / "checkpoints").iterdir()] == ["step-00000000"]


def test_copies_that_differ_leave_nothing(hub, tmp_path):
    source = shutil.copytree(hub, tmp_path / "hub")
    name = "model.layers.2.embed_tokens.weight"
    path = source / read_json(source / "model.safetensors.index.json")["weight_map"][name]
    save_file(load_file(path) | {name: load_file(path)[name] + 1}, path)
    with pytest.raises(UserError, match=f"{name} differs"):
        import_source(str(source), load(settings(tmp_path / "results")))
    assert not (tmp_path / "results").exists()


def test_what_cannot_be_read_leaves_no_checkpoint(hub, tmp_path, monkeypatch):
    """A source that changes while it is read."""
    source = shutil.copytree(hub, tmp_path / "hub")
    write = weights_only.write_planned

    def losing(path, *rest):
        for file in source.glob("*.safetensors"):
            file.unlink()
        return write(path, *rest)

    monkeypatch.setattr(weights_only, "write_planned", losing)
    with pytest.raises(UserError, match="changed while it was read"):
        import_source(str(source), load(settings(tmp_path / "results")))
    (imported,) = (tmp_path / "results" / "import").iterdir()
    assert not (imported / "checkpoints").exists() and not (imported / "imported.json").exists()
