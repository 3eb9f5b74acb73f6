"""Kernel repositories: the layout that `kernels` reads, the same bytes every time, nothing else let out; the push."""

import ast
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from headrace.config.compose import load
from headrace.errors import UserError
from headrace.publication.hub import KERNEL, Publication, push
from headrace.publication.kernels import KernelRepository, build_kernel_repositories, inspect, sources
from project import ROOT
from publication.publication_fixtures import FAULTS, emptied, failing, local_files

KERNELS_INSTALLED = any(one.metadata["Name"] == "kernels" for one in importlib.metadata.distributions())
LOADABLE = ("headrace-fp8-quantisation", "headrace-fp8-gemm", "headrace-moe-routing")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, KernelRepository]:
    built = build_kernel_repositories(tmp_path_factory.mktemp("kernels"), "me", sources())
    return {one.folder.name: one for one in built}


def copy_of(package: str, folder: Path) -> Path:
    """A package's folder beside a licence, as in a checkout, to be spoilt."""
    shutil.copytree(ROOT / "kernels" / package, folder / "kernels" / package)
    shutil.copy(ROOT / "LICENSE", folder)
    return folder / "kernels" / package


def build_folder(repository: KernelRepository) -> Path:
    return repository.folder / "build" / "torch-cuda"


def load_as_kernels_does(build: Path) -> ModuleType:
    """What kernels 0.17 does with a build (importer.py): import `__init__.py` under the id of metadata.json."""
    name = json.loads((build / "metadata.json").read_text())["id"]
    specification = importlib.util.spec_from_file_location(name, build / "__init__.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def test_each_package_is_a_repository_of_the_owner(repositories):
    assert {one.repo_id for one in repositories.values()} == {f"me/{name}" for name in (*LOADABLE, "headrace-dispatch")}
    assert {name for name, one in repositories.items() if one.loadable} == set(LOADABLE)
    for one in repositories.values():
        assert one.version == 1
        assert {"README.md", "LICENSE", "build.toml", "flake.nix", "headrace.json"} <= set(one.files)


@pytest.mark.parametrize("name", LOADABLE)
def test_metadata_is_what_kernels_reads(repositories, name):
    build = build_folder(repositories[name])
    metadata = json.loads((build / "metadata.json").read_text())
    assert metadata.keys() == {"name", "id", "version", "license", "python-depends", "backend", "digest"}
    assert (metadata["name"], metadata["version"], metadata["license"]) == (name, 1, "Apache-2.0")
    assert metadata["id"].isidentifier() and metadata["backend"] == {"type": "cuda"}
    files = {path.relative_to(build).as_posix(): path.read_bytes() for path in build.rglob("*") if path.is_file()}
    files.pop("metadata.json")
    digests = {key: base64.b64encode(hashlib.sha256(data).digest()).decode() for key, data in files.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    source = ROOT / "kernels" / name.removeprefix("headrace-").replace("-", "_") / "torch-ext" / name.replace("-", "_")
    assert files == {path.name: path.read_bytes() for path in source.glob("*.py")}


@pytest.mark.parametrize("name", LOADABLE)
def test_a_build_loads_under_its_own_name_beside_the_installed_package(repositories, name):
    module = load_as_kernels_does(build_folder(repositories[name]))
    installed = ROOT / "kernels" / name.removeprefix("headrace-").replace("-", "_") / "torch-ext"
    tree = ast.parse((installed / name.replace("-", "_") / "__init__.py").read_text())
    (offered,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert all(getattr(module, one) is not None for one in offered)
    own = [one for key, one in sys.modules.items() if key.startswith(module.__name__)]
    assert {Path(one.__file__).parent for one in own} == {build_folder(repositories[name])}


_LOAD = """
import sys
from pathlib import Path
import kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from kernels.variants import get_variants_local
repository = Path(sys.argv[1])
build = repository / "build" / "torch-cuda"
Build.open(repository)
metadata = Metadata.read_from_file(build / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
assert [one.variant_str for one in get_variants_local(build.parent)] == ["torch-cuda"]
assert kernels.get_local_kernel(build).__name__ == metadata.id
"""


@pytest.mark.parametrize("name", LOADABLE)
def test_the_kernels_library_loads_it(repositories, name, tmp_path):
    if not KERNELS_INSTALLED:
        pytest.skip("the library `kernels` is not installed; layout and metadata are checked above")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    load_it = [sys.executable, "-c", _LOAD, str(repositories[name].folder)]
    subprocess.run(load_it, cwd=tmp_path, env=environment, check=True, timeout=120)


def test_the_package_with_cuda_sources_goes_out_as_source_and_says_so(repositories):
    dispatch = repositories["headrace-dispatch"]
    assert not any(name.startswith("build/") for name in dispatch.files)
    assert "torch-ext/headrace_dispatch/dispatch_cuda/movers.cu" in dispatch.files
    assert "needs Nix" in (dispatch.folder / "README.md").read_text()


def test_cards_name_their_repository(repositories):
    for one in repositories.values():
        card = (one.folder / "README.md").read_text()
        assert "{{" not in card and f'get_kernel("{one.repo_id}", version=1, trust_remote_code=True)' in card


def test_the_same_source_gives_the_same_bytes_and_another_one_another_name(tmp_path):
    package = copy_of("moe_routing", tmp_path)
    (first,) = build_kernel_repositories(tmp_path / "a", "me", [package])
    (second,) = build_kernel_repositories(tmp_path / "b", "me", [package])
    for name in first.files:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    routing = package / "torch-ext" / "headrace_moe_routing" / "routing.py"
    routing.write_text(routing.read_text() + "\n")
    (third,) = build_kernel_repositories(tmp_path / "c", "me", [package])
    ids = [json.loads((build_folder(one) / "metadata.json").read_text())["id"] for one in (first, second, third)]
    assert ids[0] == ids[1] != ids[2] and first.fingerprint == second.fingerprint != third.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("movers.so", b"\x7fELF", "does not belong"),
        ("secret.py", b'TOKEN = "hf_' + b"a1B2c3D4" * 5 + b'"\n', "a Hugging Face token"),
        ("latin.py", "# café\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_what_may_not_go_out_is_named(tmp_path, name, content, says):
    package = copy_of("moe_routing", tmp_path)
    (package / "torch-ext" / "headrace_moe_routing" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: publish: [^\n]*{says}"):
        build_kernel_repositories(tmp_path / "out", "me", [package])


def test_links_are_not_followed_and_bytecode_is_left_out(tmp_path):
    package = copy_of("moe_routing", tmp_path)
    folder = package / "torch-ext" / "headrace_moe_routing"
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "routing.cpython-311.pyc").write_bytes(b"\0")
    (one,) = build_kernel_repositories(tmp_path / "out", "me", [package])
    assert not any("__pycache__" in name for name in one.files) and inspect(one.folder) == list(one.files)
    (folder / "outside.py").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="symbolic link"):
        build_kernel_repositories(tmp_path / "again", "me", [package])


def test_an_installation_without_sources_is_told_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^publish\.kernels: [^\n]*checkout[^\n]*$"):
        sources()


@pytest.mark.parametrize("owner", ["me/mine", "a--b", "-me", "me.", "über", "a b"])
def test_bad_owners_are_refused_in_one_line(owner):
    with pytest.raises(UserError, match=rf"^config: publish\.kernels: [^\n]*{re.escape(owner)}[^\n]*$"):
        load([f"publish.kernels='{owner}'"])


def test_the_default_publishes_none():
    assert load([]).publish.kernels is None
    assert load(["publish.kernels=my-org"]).publish.kernels == "my-org"


uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


def push_kernel(hub, one: KernelRepository, private: bool = True) -> Publication:
    return push(
        one.folder,
        one.repo_id,
        private=private,
        message="Kernel",
        endpoint=hub.url,
        kind=KERNEL,
        branch=one.branch,
    )


@uploads
def test_a_push_is_one_private_commit_on_the_versions_branch_and_a_second_one_nothing(hub, repositories):
    for name, one in repositories.items():
        done = push_kernel(hub, one)
        remote = hub.repositories[f"kernels/me/{name}"]
        assert remote.private and done.private and done.changed and remote.messages == ["initial", "Kernel"]
        assert remote.branches == {"main": remote.head, "v1": done.commit} and remote.head != done.commit
        assert remote.tags == {one.fingerprint: done.commit} and done.tag == one.fingerprint
        files = {path: blob.data for path, blob in remote.commits[done.commit].items() if path != ".gitattributes"}
        assert files == local_files(one.folder) and done.url == f"{hub.url}/kernels/me/{name}"
    hub.requests.clear()
    assert not any(push_kernel(hub, one).changed for one in repositories.values())
    assert not [request for request in hub.requests if "/commit/" in request or "/tag/" in request]
    assert set(hub.repositories) == {f"kernels/me/{name}" for name in repositories}


@uploads
def test_what_the_version_resolves_to_is_downloaded_and_loads(hub, repositories, tmp_path):
    """The requests of `get_kernel(repo, version=1)`: the branch among the refs, then the build's folder."""
    push_kernel(hub, repositories["headrace-moe-routing"])
    api = HfApi(endpoint=hub.url, token=hub.read_token)
    branches = api.list_repo_refs("me/headrace-moe-routing", repo_type="kernel").branches
    commit = {branch.name: branch.target_commit for branch in branches}["v1"]
    loaded = huggingface_hub.snapshot_download(
        "me/headrace-moe-routing",
        repo_type="kernel",
        revision=commit,
        allow_patterns="build/*",
        endpoint=hub.url,
        token=hub.read_token,
        cache_dir=tmp_path,
    )
    assert callable(load_as_kernels_does(Path(loaded) / "build" / "torch-cuda").route)


@uploads
def test_new_source_is_a_new_commit_old_source_another_and_what_the_builder_uploaded_stays(hub, tmp_path):
    package = copy_of("moe_routing", tmp_path)
    (package / "torch-ext" / "headrace_moe_routing" / "old.py").write_text("")
    (first,) = build_kernel_repositories(tmp_path / "a", "me", [package])
    tagged = push_kernel(hub, first).commit
    compiled = "build/torch213-cxx11-cu130-x86_64-linux/__init__.py"
    HfApi(endpoint=hub.url, token=hub.token).create_commit(
        first.repo_id,
        [CommitOperationAdd(compiled, b"x = 1\n")],
        commit_message="Builder",
        repo_type="kernel",
        revision="v1",
    )
    assert not push_kernel(hub, first).changed
    (package / "torch-ext" / "headrace_moe_routing" / "old.py").unlink()
    (second,) = build_kernel_repositories(tmp_path / "b", "me", [package])
    done = push_kernel(hub, second)
    remote = hub.repositories["kernels/me/headrace-moe-routing"]
    assert remote.messages == ["initial", "Kernel", "Builder", "Kernel"] and remote.branches["v1"] == done.commit
    assert set(remote.commits[done.commit]) == {*second.files, ".gitattributes", compiled}
    back = push_kernel(hub, first)
    assert back.changed and remote.branches["v1"] == back.commit
    assert remote.tags == {first.fingerprint: tagged, second.fingerprint: done.commit}


def held(hub, revision: str) -> dict[str, bytes]:
    remote = hub.repositories["kernels/me/headrace-moe-routing"]
    files = remote.commits[remote.resolve(revision)]
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


@uploads
@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_is_cut_off_at_any_request_is_ended_by_the_next(fault, hub, repositories, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    one = repositories["headrace-moe-routing"]
    expected, name = local_files(one.folder), "kernels/me/headrace-moe-routing"
    for at in range(1, 100):
        emptied(hub)
        error = failing(hub, lambda: push_kernel(hub, one), fault, at)
        if len(hub.requests) < at:
            assert error is None
            break
        assert error is None or str(error).startswith("publish.kernels: me/headrace-moe-routing: ")
        assert error is not None or fault != 403, hub.requests[at - 1]
        if remote := hub.repositories.get(name):
            assert remote.private and held(hub, "main") == {}
            assert "v1" not in remote.branches or held(hub, "v1") in ({}, expected)
            assert all(held(hub, tag) == expected for tag in remote.tags)
        done = push_kernel(hub, one)
        assert held(hub, "v1") == held(hub, one.fingerprint) == expected
        assert hub.repositories[name].messages == ["initial", "Kernel"]
        assert hub.repositories[name].tags == {one.fingerprint: done.commit}
    assert at > 8, "a push asks for more than that"


@uploads
@pytest.mark.parametrize("fault", FAULTS)
def test_new_source_that_is_cut_off_leaves_the_old_one_whole(fault, hub, repositories, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    first, package = repositories["headrace-moe-routing"], copy_of("moe_routing", tmp_path)
    routing = package / "torch-ext" / "headrace_moe_routing" / "routing.py"
    routing.write_text(routing.read_text() + "\n")
    (second,) = build_kernel_repositories(tmp_path / "out", "me", [package])
    old, new = local_files(first.folder), local_files(second.folder)
    push_kernel(hub, first)
    kept = deepcopy(hub.repositories), dict(hub.objects)
    for at in range(1, 100):
        hub.repositories, hub.objects = deepcopy(kept[0]), dict(kept[1])
        failing(hub, lambda: push_kernel(hub, second), fault, at)
        if len(hub.requests) < at:
            break
        assert held(hub, first.fingerprint) == old and held(hub, "v1") in (old, new)
        push_kernel(hub, second)
        assert held(hub, first.fingerprint) == old and held(hub, "v1") == held(hub, second.fingerprint) == new
    assert at > 8, "a push asks for more than that"


def test_refusals_are_one_line_that_names_the_kernel(hub, repositories, monkeypatch):
    one = repositories["headrace-moe-routing"]
    hub.fail("POST", "/repos/create", 403)  # an owner to whom the Hub gives no kernel repositories
    with pytest.raises(UserError, match=r"^publish\.kernels: me/headrace-moe-routing: [^\n]*403[^\n]*$"):
        push_kernel(hub, one)
    HfApi(endpoint=hub.url, token=hub.token).create_repo(one.repo_id, repo_type="kernel", private=False)
    with pytest.raises(UserError, match=r"^publish\.kernels: me/headrace-moe-routing: [^\n]*is public[^\n]*$"):
        push_kernel(hub, one)
    with pytest.raises(UserError, match=r"publication/gate\.py|code are never published"):
        push(one.folder, "me/model", private=True, message="Publish", endpoint=hub.url)
    assert set(hub.repositories) == {"kernels/me/headrace-moe-routing"}
