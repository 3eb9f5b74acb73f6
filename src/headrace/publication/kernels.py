"""The kernel packages as Hub kernel repositories, laid out as the `kernels` library of Hugging Face loads them.

    README.md                           the package's CARD.md with the repository's name filled in
    LICENSE, build.toml, flake.nix      and torch-ext/, benchmarks/: the source, from which kernel-builder builds
    build/torch-cuda/                   what is loaded: the package's modules, and metadata.json
    headrace.json                       every file with size and sha256, as in a model's repository

Triton kernels (`[torch-noarch]` in build.toml) need no compiler: their build is a copy of the package, one per back end
that build.toml names. Version n is what the branch v<n> holds, and `get_kernel(repo, version=n)` takes it from there;
for owners that are not on the library's own list of publishers it wants `trust_remote_code=True`. A package with CUDA
sources is published as source only: kernel-builder compiles it and needs Nix; its card says so.

metadata.json calls the kernel by a hash of its files, because the library registers modules under that name and may
load several versions at once. A repository depends on its source and its name alone, not on time, machine or the model
beside it: the same source gives the same bytes. This module runs nothing of what it copies.
"""

import base64
import hashlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.artifacts.files import write_atomic
from headrace.errors import UserError
from headrace.publication.card_checks import card_problem
from headrace.publication.gate import looks_random
from headrace.publication.repository import MANIFEST
from headrace.tracking.redact import find_secrets

PACKAGES = ("headrace_fp8_quantisation", "headrace_fp8_gemm", "headrace_moe_routing", "headrace_dispatch")
_SUFFIXES = {".py", ".cpp", ".cu", ".h", ".toml", ".nix", ".md", ".json"}
_NAMES = {"LICENSE", "build.toml", "flake.nix", "README.md", MANIFEST}
_FOLDERS = ("torch-ext/", "benchmarks/", "build/torch-")
_LARGEST = 1 << 20  # bytes of one file; sources are small
_WORD = re.compile(r"[A-Za-z0-9+=_-]{32,}")


@dataclass(frozen=True)
class KernelRepository:
    """A repository's tree on disk."""

    folder: Path
    repo_id: str
    version: int  # of the kernel's interface
    loadable: bool  # false: source only, to be compiled before `get_kernel` finds anything
    fingerprint: str  # of its files
    files: tuple[str, ...]

    @property
    def branch(self) -> str:
        """Where `get_kernel` looks for this version."""
        return f"v{self.version}"


def sources() -> list[Path]:
    """The kernel packages' folders, kernels/<package>; raises `UserError` where only their modules are installed."""
    folders = []
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        folder = Path(found.origin).parents[2] if found and found.origin else None
        if folder is None or not (folder / "build.toml").is_file():
            raise UserError(
                f"publish.kernels: the source of {package} is not in this installation; install headrace with "
                "`pip install --editable` from a checkout, or set publish.kernels=null"
            )
        folders.append(folder)
    return folders


def build_kernel_repositories(target: Path, owner: str, packages: Sequence[Path]) -> list[KernelRepository]:
    """Write `target`/<name> for each package folder; `owner` is the user or organisation on the Hub.

    Raises `UserError` for a file that does not belong into a kernel repository, or that holds what looks like a secret.
    """
    return [_build(target, owner, package) for package in packages]


def inspect(folder: Path) -> list[str]:
    """The files of a kernel repository that may go out, sorted; raises `UserError` that names the first which may not.

    Unlike a model's repository this one holds code: the project's own, on a closed list of places and file types.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    for name in names:
        _check(folder / name, name)
    return names


def _build(target: Path, owner: str, package: Path) -> KernelRepository:
    description = tomllib.loads((package / "build.toml").read_text(encoding="utf-8"))
    general = description["general"]
    repo_id, version = f"{owner}/{general['name']}", general["version"]
    card = (package / "CARD.md").read_text(encoding="utf-8").replace("{{ repo_id }}", repo_id)
    files = {"README.md": card.encode(), "LICENSE": (package.parents[1] / "LICENSE").read_bytes()}
    files |= {path.relative_to(package).as_posix(): path.read_bytes() for path in _source_files(package)}
    if "torch-noarch" in description:
        module = f"torch-ext/{general['name'].replace('-', '_')}/"
        modules = {name.removeprefix(module): data for name, data in files.items() if name.startswith(module)}
        for backend in general["backends"]:
            build = {**modules, "metadata.json": _metadata(general, backend, modules)}
            files |= {f"build/torch-{backend}/{name}": data for name, data in build.items()}
    listed = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(files.items())
    }
    fingerprint = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]
    files[MANIFEST] = _json({"schema": 1, "fingerprint": fingerprint, "files": listed})
    folder = target / general["name"]
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, data)
    loadable = "torch-noarch" in description
    return KernelRepository(folder, repo_id, version, loadable, fingerprint, tuple(inspect(folder)))


def _source_files(package: Path) -> Iterator[Path]:
    yield package / "build.toml"
    yield package / "flake.nix"
    yield from sorted((package / "benchmarks").glob("benchmark*.py"))
    for path in sorted((package / "torch-ext").rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path}: publish: is a symbolic link; publish the file itself")
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _metadata(general: Mapping[str, Any], backend: str, modules: Mapping[str, bytes]) -> bytes:
    """metadata.json of a build, in the keys that kernels 0.17 reads; digests are base64, as it wants them."""
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(modules.items())}
    unique = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
    return _json(
        {
            "name": general["name"],
            "id": f"_{general['name'].replace('-', '_')}_{backend}_{unique}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
    )


def _check(path: Path, name: str) -> None:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: publish: is not an ordinary file")
    known = name in _NAMES or (name.startswith(_FOLDERS) and path.suffix in _SUFFIXES)
    if not known or path.stat().st_size > _LARGEST:
        raise UserError(f"{path}: publish: does not belong into a kernel repository (publication/kernels.py)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: publish: is not UTF-8 text") from None
    if name == "README.md" and (wrong := card_problem(text)):
        raise UserError(f"{path}: publish: {wrong}")
    for kind, start, _ in find_secrets(text):
        line = text.count("\n", 0, start) + 1
        raise UserError(
            f"{path}: publish: line {line} holds what looks like {kind}; remove it, revoke it if it is real"
        )
    if path.suffix != ".json" and any(map(looks_random, _WORD.findall(text))):
        raise UserError(f"{path}: publish: holds random-looking characters, as a key would; remove them")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
