"""Each kernel package is laid out as the Hub's kernel-builder reads it, imports torch and triton only, names its offer.

The builder itself needs Nix. What it would refuse in `build.toml` (edition 5, huggingface/kernels) is checked here by
its published rules: known fields only, a name of lowercase letters, digits and dashes, one framework.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
PACKAGES = sorted(path.parent.name for path in KERNELS.glob("*/torch-ext"))
GENERAL = {"name", "version", "edition", "license", "backends"}
GENERAL_OPTIONAL = {"upstream", "source", "minver", "cuda", "hub", "kernel-depends", "python-depends"}
FRAMEWORKS = {
    "torch": {"include", "minver", "maxver", "pyext", "src", "stable-abi", "cxx-flags"},
    "torch-noarch": {"pyext", "cuda_capabilities", "rocm_archs"},
}
KERNEL = {"backend", "depends", "include", "src", "cuda-capabilities", "cuda-flags", "cuda-minver", "cxx-flags"}
MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}

each_package = pytest.mark.parametrize("package", PACKAGES)


def source_folder(package: str) -> Path:
    return KERNELS / package / "torch-ext" / f"headrace_{package}"


def build_file(package: str) -> dict:
    return tomllib.loads((KERNELS / package / "build.toml").read_text())


def exported(package: str) -> list[str]:
    """The names in `__all__` of the package."""
    tree = ast.parse((source_folder(package) / "__init__.py").read_text())
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"]
    assert len(lists) == 1, f"{package}/__init__.py has to list its names in one __all__"
    return ast.literal_eval(lists[0])


def test_there_are_four_packages():
    assert PACKAGES == ["dispatch", "fp8_gemm", "fp8_quantisation", "moe_routing"]


@each_package
def test_all_parts_are_there(package):
    root, source = KERNELS / package, source_folder(package)
    parts = [
        root / "build.toml",
        root / "CARD.md",
        root / "flake.nix",
        root / "benchmarks" / "benchmark.py",
        source / "__init__.py",
        source / "reference.py",
        source / "variants.py",
    ]
    assert [str(part.relative_to(KERNELS)) for part in parts if not part.is_file()] == []
    assert list((root / "tests").glob("test_*.py")), f"{package} has no tests"


@each_package
def test_build_file_keeps_to_the_builders_rules(package):
    tree = build_file(package)
    general = tree["general"]
    assert general.keys() >= GENERAL, f"missing: {GENERAL - general.keys()}"
    assert general.keys() <= GENERAL | GENERAL_OPTIONAL, f"unknown: {general.keys() - GENERAL - GENERAL_OPTIONAL}"
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"]), (
        f"{general['name']}: lowercase, digits and dashes only"
    )
    assert general["name"].replace("-", "_") == f"headrace_{package}", "the builder looks for torch-ext/<name>"
    assert (general["edition"], general["license"]) == (5, "Apache-2.0")
    assert isinstance(general["version"], int)
    assert "cuda" in general["backends"]
    frameworks = tree.keys() - {"general", "kernel"}
    assert len(frameworks) == 1, f"one framework, not {sorted(frameworks)}"
    (framework,) = frameworks
    assert tree[framework].keys() <= FRAMEWORKS[framework]


@each_package
def test_compiled_sources_named_in_the_build_file_exist(package):
    tree = build_file(package)
    sources = list(tree.get("torch", {}).get("src", []))
    for name, kernel in tree.get("kernel", {}).items():
        assert kernel.keys() <= KERNEL, f"{name}: {kernel.keys() - KERNEL}"
        assert kernel["backend"] == "cuda"
        sources += kernel["src"]
    assert [source for source in sources if not (KERNELS / package / source).is_file()] == []


@each_package
def test_card_names_what_the_package_offers(package):
    card = (KERNELS / package / "CARD.md").read_text()
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "kernels"
    assert fields["license"].lower() == build_file(package)["general"]["license"].lower()
    assert isinstance(fields["tags"], list)
    functions = [name for name in exported(package) if name.islower()]
    assert functions, f"{package} exports no function"
    assert [name for name in functions if not re.search(rf"\b{name}\b", body)] == [], "not in CARD.md"


@each_package
def test_imports_torch_and_triton_only(package):
    """And its own modules relatively, since the Hub loads several versions of a kernel under names of its choice."""
    strangers = []
    for path in source_folder(package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            strangers += [f"{path.name}:{node.lineno} {name}" for name in names if name.split(".")[0] not in MAY_IMPORT]
    assert strangers == []


@each_package
def test_every_module_says_what_it_is_for_in_a_length_that_is_read(package):
    for path in source_folder(package).rglob("*.py"):
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(KERNELS)} has no docstring"
        assert len(text.splitlines()) <= 400, f"{path.relative_to(KERNELS)} is longer than 400 lines"
