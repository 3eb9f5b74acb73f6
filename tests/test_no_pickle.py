"""Nothing that Headrace reads can run code: a lint over all sources, and an audit of what its programs unpickle.

The lint knows names as they are imported, so `from torch import load as read` is `torch.load`. A name is refused where
it is mentioned, called or not. The audit runs real stages with `sys.addaudithook` in every process of theirs.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake.parser import parse

from headrace.config.compose import load
from headrace.corpus.sources import known_lock
from headrace.stages import pretrain
from headrace.stages.places import places
from headrace.stages.run import main
from small_corpus import tokenized

ROOT = Path(__file__).resolve().parents[1]
PLACES = [ROOT / name for name in ("src", "kernels", "workflow")]
SOURCES = sorted(path for place in PLACES for path in place.rglob("*.py"))
RULES = [ROOT / "Snakefile", *sorted(path for place in PLACES for path in place.rglob("*.smk"))]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
NAMES = {
    "torch.load", "torch.save", "torch.jit.load", "torch.serialization.load",
    "numpy.load",  # arrays come as safetensors or raw
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "hydra.utils.instantiate", "hydra.utils.call",
}  # fmt: skip
METHODS = {  # whoever has them: pandas' pickles, and torch's collectives that pickle what they send
    "read_pickle", "to_pickle", "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
KEYWORDS = {"allow_pickle", "shell"}  # whatever their value: the defaults are right


def offences(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of everything in `tree` that is refused."""
    known = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        found += [(getattr(node, "lineno", 0), name) for name in refused(node, known)]
    return found


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, dotted."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def refused(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module:
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in full if name.split(".")[0] in MODULES or is_refused(name))
    elif isinstance(node, ast.Attribute | ast.Name):
        name = dotted(node, known)
        if is_refused(name):
            yield name
    elif isinstance(node, ast.Call):
        yield from refused_arguments(node, known)


def is_refused(name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return name in NAMES or last in METHODS or (owner in {"", "builtins"} and last in BUILTINS)


def refused_arguments(call: ast.Call, known: dict[str, str]) -> Iterator[str]:
    for keyword in call.keywords:
        is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in KEYWORDS or (keyword.arg == "trust_remote_code" and not is_false):
            yield keyword.arg
    called, text = dotted(call.func, known), _text(call.args)
    if called == "importlib.import_module" and text.split(".")[0] in MODULES:
        yield text
    if called == "getattr" and is_refused(f"{dotted(call.args[0], known)}.{text}"):
        yield f"{dotted(call.args[0], known)}.{text}"


def _text(arguments: list[ast.expr]) -> str:
    """The first text among a call's arguments."""
    texts = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
    return next((text for text in texts if isinstance(text, str)), "")


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def python_of(snakefile: Path) -> str:
    """The Python that Snakemake runs for a file of rules."""
    source = SimpleNamespace(get_path_or_uri=lambda secret_free: str(snakefile))
    workflow = SimpleNamespace(sourcecache=SimpleNamespace(open=lambda _: snakefile.open()))
    text, _ = parse(source, workflow, {})
    return str(text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_mentions_what_can_run_a_files_content(path: Path) -> None:
    assert offences(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", RULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_rule_of_the_workflow_does(path: Path) -> None:
    assert offences(ast.parse(python_of(path))) == []


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 150
    assert len(RULES) > 8


@pytest.mark.parametrize(
    ("source", "name"),
    [
        *((f"import {module}", module) for module in sorted(MODULES)),
        *((f"def f():\n    from {module} import loads", f"{module}.loads") for module in sorted(MODULES)),
        ("import pickle as harmless", "pickle"),
        ("import importlib\nimportlib.import_module('dill')", "dill"),
        *((f"{name}('1')", name) for name in sorted(BUILTINS)),
        ("run = eval", "eval"),
        ("import builtins\nbuiltins.exec('1')", "builtins.exec"),
        *((f"import {name.split('.')[0]}\n{name}(x)", name) for name in sorted(NAMES)),
        ("import torch as t\nt.load('a.pt', weights_only=True)", "torch.load"),
        ("from torch import load as read", "torch.load"),
        ("from os import system", "os.system"),
        ("import torch\nread = getattr(torch, 'load')", "torch.load"),
        *((f"import x\nx.{name}(1)", f"x.{name}") for name in sorted(METHODS)),
        ("import torch.distributed as dist\ndist.all_gather_object(a, b)", "torch.distributed.all_gather_object"),
        *((f"f(x, {name}=True)", name) for name in sorted(KEYWORDS)),
        ("f(x, trust_remote_code=True)", "trust_remote_code"),
        ("f(x, trust_remote_code=chosen)", "trust_remote_code"),
    ],
)
def test_every_rule_fires(source: str, name: str) -> None:
    assert name in [found for _, found in offences(ast.parse(source))]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(model)",
        "from re import compile\ncompile('x')",
        "import yaml\nyaml.safe_load(text)",
        "import json\njson.load(file)",
        "f(x, trust_remote_code=False)",
        "schedule.load(1)",
        "'eval(1) in a text'",
    ],
)
def test_what_is_harmless_passes(source: str) -> None:
    assert offences(ast.parse(source)) == []


# Python runs a module of this name at its start, so every process of a stage is watched, its ranks too.
WATCH = """
import os, pickle, sys

def note(what):
    descriptor = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (what.replace(chr(10), " ") + chr(10)).encode())
    os.close(descriptor)

def noted(name, function):
    def called(*arguments, **keywords):
        caller = sys._getframe(1)
        note(f"unpickled: {name} from {caller.f_code.co_filename}:{caller.f_lineno}")
        return function(*arguments, **keywords)
    return called

def hook(event, arguments):
    if event == "pickle.find_class":
        note(f"unpickled: {arguments}")

sys.addaudithook(hook)
pickle.load, pickle.loads = noted("load", pickle.load), noted("loads", pickle.loads)
note("watched: " + " ".join(sys.orig_argv))
"""


@dataclass(frozen=True)
class Watched:
    """Runs programs whose processes note what they unpickle."""

    folder: Path

    def run(self, *words: str) -> list[str]:
        """What the program's processes noted."""
        (self.folder / "sitecustomize.py").write_text(WATCH)
        notes = self.folder / "notes"
        notes.unlink(missing_ok=True)
        environment = {**os.environ, "WATCHED": str(notes), "PYTHONPATH": str(self.folder)}
        done = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300, cwd=self.folder
        )
        assert done.returncode == 0, done.stderr
        return notes.read_text().splitlines()


def unpickled(noted: list[str]) -> list[str]:
    return [line for line in noted if not line.startswith("watched: ")]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_the_watch_sees_classes_and_plain_values(watched: Watched) -> None:
    load = "import pickle, fractions; pickle.loads(pickle.dumps({}))"
    noted = watched.run("-c", load.format("fractions.Fraction(1, 2)"))
    assert any("'fractions', 'Fraction'" in line for line in noted), noted
    assert any(line.startswith("unpickled: loads from <string>:1") for line in watched.run("-c", load.format("[1]")))
    assert unpickled(watched.run("-c", "import pickle, multiprocessing")) == []


SMALL = (
    "experiment=tiny", "tracking=disabled", "corpus=files", "corpus.validation_fraction=0.2",
    "corpus.heldout_fraction=0.2", "tokenizer.vocab_size=300", "recipe.sequence_length=16", "recipe.batch_sequences=8",
    f"recipe.tokens={128 * 30}", "recipe.ema_decay=0.9", "train.validate_every=20", "train.validation_rows=3",
    "checkpoint.interval=10", "checkpoint.keep=3", "launch.threads=1", "launch.device=cpu",
    "recipe.batch_ramp=null", "recipe.extensions=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of three checkpoints, trained in this process."""
    words = tokenized(tmp_path_factory.mktemp("trained"), SMALL)
    assert main(pretrain.DOOR, words) == 0
    return words


def test_a_resume_unpickles_nothing_on_any_rank(trained: list[str], watched: Watched) -> None:
    """Two ranks take up what one process wrote."""
    config = load(trained)
    place = places(config, known_lock(config).hash)["pretrain"]
    shutil.rmtree(place.artifact)
    place.done.unlink()
    shutil.rmtree(place.folder / "checkpoints" / "step-00000030")
    noted = watched.run("-m", "headrace.stages.pretrain", *trained, "parallel.pipeline=2", "parallel.microbatch=1")
    assert unpickled(noted) == []
    assert len([line for line in noted if "on_rank" in line]) == 2
    assert "going on after step 20 of 30" in place.log.read_text()


def test_conversion_evaluation_and_publication_unpickle_nothing(trained: list[str], watched: Watched) -> None:
    runs = [("convert", "convert.weights=ema"), ("convert",), ("evaluate",), ("publish", "publish.allow_dirty=true")]
    for stage, *words in runs:
        noted = watched.run("-m", f"headrace.stages.{stage}", *trained, *words)
        assert unpickled(noted) == []
        assert any(f"headrace.stages.{stage}" in line for line in noted)
