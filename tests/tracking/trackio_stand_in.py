"""A package `trackio` that writes down what it is told; names and signatures are those of trackio 0.43.0.

The mirror is another process, so the stand-in is a package on its path and its memory is a file in `TRACKIO_DIR`.
"""

import json
import os

_SOURCE = """
import json, os
from pathlib import Path

_FILE = Path(os.environ["TRACKIO_DIR"]) / "calls.jsonl"


def _write(*call):
    with _FILE.open("a") as file:
        file.write(json.dumps(call) + chr(10))


class Artifact:
    def __init__(self, name, type, description=None, metadata=None):
        self.told = {"name": name, "type": type, "metadata": metadata}

    def add_file(self, local_path, name=None):
        self.told["file"] = [name, Path(local_path).read_text()]


class Run:
    def __init__(self):
        calls = [json.loads(line) for line in _FILE.open()] if _FILE.exists() else []
        self._next_step = 1 + max((call[2] for call in calls if call[0] == "log"), default=-1)

    def log(self, metrics, step=None):
        _write("log", metrics, step)

    def log_artifact(self, artifact_or_path, name=None, type=None, aliases=None, overwrite=False):
        _write("log_artifact", artifact_or_path.told, aliases)

    def use_artifact(self, artifact_or_name, type=None):
        _write("use_artifact", artifact_or_name)
        raise ValueError("not found in project")

    def finish(self):
        _write("finish")


def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
         resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
         auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):
    told = {"project": project, "name": name, "group": group, "config": config, "resume": resume, "private": private}
    run = Run()
    _write("init", told, sorted(os.environ))
    return run
"""


def install(folder, monkeypatch, source=_SOURCE, name="trackio"):
    """Put the package before all others, here and in processes that are started; returns its folder of data."""
    package, data = folder / "stand-in" / name, folder / "trackio-data"
    package.mkdir(parents=True)
    data.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TRACKIO_DIR", str(data))
    return data


def calls(data, kind):
    """What the stand-in was told, in order, without the name of the call."""
    lines = [json.loads(line) for line in (data / "calls.jsonl").read_text().splitlines()]
    return [line[1:] for line in lines if line[0] == kind]
