"""Files elsewhere: an object store in memory, one with and one without etags, read and locked like files here."""

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from headrace.artifacts import retry
from headrace.config.compose import load
from headrace.config.schema import CorpusConfig, SourceConfig
from headrace.corpus import lock as lock_module
from headrace.corpus.build import build_corpus
from headrace.corpus.documents import selected_documents
from headrace.corpus.lock import build_lock, ensure, index
from headrace.corpus.pieces import pieces
from headrace.corpus.remote import identity, list_remote
from headrace.errors import UserError
from loopback_hub import LoopbackHub
from loopback_repository import Blob, Repository

TEXTS = [f"text number {number} " * 20 for number in range(90)]


class Tagged(MemoryFileSystem):
    """An object store that tells an etag of each object and counts what is fetched."""

    protocol = "tagged"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fetched: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("tagged://", "memory://"))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = super().info(path, **options)
        return self._tagged(found)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        found = super().find(path, *arguments, **{**options, "detail": True})
        tagged = {name: self._tagged(info) for name, info in found.items()}
        return tagged if options.get("detail") else list(tagged)

    def _tagged(self, info: dict[str, Any]) -> dict[str, Any]:
        if info["type"] == "file":
            tag = str(hash(bytes(self.store[info["name"]].getbuffer())) & 0xFFFFFFFF)
            return {**info, "ETag": f'"{tag}"'}
        return info

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.fetched.append(path)
        return super()._open(path, *arguments, **options)


class Failing(Tagged):
    """It fails so often before each answer, whatever it is asked; `together` counts questions at a time."""

    protocol = "failing"
    failures: ClassVar[int] = 0
    streak: ClassVar[dict[Any, int]] = {}
    asked: ClassVar[int] = 0
    together: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("failing://", "tagged://"))

    @classmethod
    def perhaps_fail(cls, *question: Any) -> None:
        cls.streak[question] = cls.streak.get(question, 0) + 1
        if cls.streak[question] <= cls.failures:
            raise OSError("503 slow down")
        cls.streak[question] = 0

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self.perhaps_fail("info", path)
        Failing.asked += 1
        time.sleep(0.01)
        Failing.together = max(Failing.together, Failing.asked)
        Failing.asked -= 1
        return super().info(path, **options)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.perhaps_fail("find", path)
        return super().find(path, *arguments, **options)

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.perhaps_fail("open", path)
        return FailingFile(super()._open(path, *arguments, **options), path)


class FailingFile(io.BytesIO):
    """A read that fails has moved on nevertheless."""

    def __init__(self, file: Any, path: str) -> None:
        super().__init__(bytes(file.getbuffer()))
        self._path = path

    def read(self, size: int | None = -1) -> bytes:
        question = ("read", self._path, self.tell(), size)
        data = super().read(size)
        Failing.perhaps_fail(*question)
        return data


in_memory = pytest.mark.parametrize("store", ["memory"], indirect=True)


@pytest.fixture
def failing(config: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    """The same bucket behind a store that can fail."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(Failing, "store", MemoryFileSystem.store)
    monkeypatch.setattr(Failing, "failures", 0)
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0, 0.0))
    moved = [replace(each, paths=(each.paths[0].replace("memory:", "failing:"),)) for each in config.sources]
    return replace(config, sources=tuple(moved))


@pytest.fixture(params=["memory", "tagged"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bucket that holds Parquet, JSONL and plain files."""
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation("tagged", Tagged, clobber=True)
    system = fsspec.filesystem(request.param)
    address = f"{request.param}://bucket"
    system.pipe(f"{address}/lines/a.jsonl", b"\n".join(orjson.dumps({"text": text}) for text in TEXTS[:30]))
    with system.open(f"{address}/web/a.parquet", "wb") as file:
        pq.write_table(pa.table({"text": TEXTS[30:60]}), file, row_group_size=10)
    for number in range(30):
        system.pipe(f"{address}/notes/{number}/note.txt", TEXTS[60 + number].encode())
    system.pipe(f"{address}/notes/.hidden", b"secret")
    Tagged.fetched.clear()
    yield address
    system.rm("/bucket", recursive=True)


@pytest.fixture
def config(store: str) -> CorpusConfig:
    sources = (
        SourceConfig("lines", (f"{store}/lines/*.jsonl",), "text"),
        SourceConfig("web", (f"{store}/web",), "text"),
        SourceConfig("notes", (f"{store}/notes",), "text"),
    )
    base = load(["corpus=files", "corpus.paths=[x]", "corpus.contamination_tasks=[]"]).corpus
    return replace(base, paths=(), sources=sources, validation_fraction=0.1, heldout_fraction=0.1)


def test_a_corpus_from_a_store_is_the_corpus_from_a_folder(config: CorpusConfig, store: str, tmp_path: Path) -> None:
    lock, out = build_lock(config), tmp_path / "out"
    out.mkdir()
    assert [file.name for file in lock.files[:3]] == [
        f"{store}/lines/a.jsonl",
        f"{store}/web/a.parquet",
        f"{store}/notes/0/note.txt",
    ]
    assert len(lock.files[1].row_groups) == 3
    kinds = {file.hash.partition(":")[0] for file in lock.files}
    assert kinds == ({"etag"} if store.startswith("tagged") else {"sha256"})
    summary = build_corpus(config, lock, out, print, piece_bytes=3000)
    assert summary["documents"] == 90
    splits = ("train", "validation", "heldout")
    every = [row for split in splits for row in selected_documents(out, lock, config, pieces(lock, 3000), split)]
    assert [text for _, _, text in sorted(every)] == [*TEXTS[:60], *sorted(TEXTS[60:], key=_by_folder)]


def _by_folder(text: str) -> str:
    return str(int(text.split()[2]) - 60)


def test_etags_make_fetching_needless(config: CorpusConfig, store: str) -> None:
    index(config, Path("lock"))
    if store.startswith("tagged"):
        assert set(Tagged.fetched) == {"/bucket/web/a.parquet"}  # its footer, for the row groups
    Tagged.fetched.clear()
    lock, new = ensure(config, Path("lock"))
    assert new == [] and Tagged.fetched == []
    assert index(config, Path("lock")) == lock and Tagged.fetched == []


def test_a_changed_and_a_vanished_object_are_named(config: CorpusConfig, store: str, tmp_path: Path) -> None:
    lock = index(config, Path("lock"))
    system = fsspec.filesystem(store.partition(":")[0])
    name = f"{store}/notes/7/note.txt"
    system.pipe(name, TEXTS[67].upper().encode())  # of the same size
    for look in (lambda: ensure(config, Path("lock")), lambda: _build(config, lock, tmp_path)):
        with pytest.raises(UserError, match=rf"^{name} changed since it was indexed; run `headrace index`"):
            look()
    system.rm(name)
    with pytest.raises(UserError, match=rf"^{name}: indexed but no longer there"):
        ensure(config, Path("lock"))
    with pytest.raises(UserError, match=rf"^{name}: no such file or folder in the store"):
        _build(config, lock, tmp_path)


def _build(config: CorpusConfig, lock: lock_module.Lock, folder: Path) -> None:
    (folder / "out").mkdir(exist_ok=True)
    build_corpus(config, lock, folder / "out", print)


@in_memory
def test_a_store_that_fails_three_times_at_everything_is_asked_again(
    failing: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = tmp_path / "calm", tmp_path / "failing"
    for folder, failures in zip(folders, (0, 3), strict=True):
        assert not caplog.records
        monkeypatch.setattr(Failing, "failures", failures)
        folder.mkdir()
        _build(failing, index(failing, folder / "lock"), folder)
    assert "note.txt: the store failed: 503 slow down; trying again in 0 s" in caplog.text
    one, other = ({path.name: path.read_bytes() for path in (folder / "out").iterdir()} for folder in folders)
    assert one == other


@in_memory
@pytest.mark.parametrize("kind", ["lines", "web", "notes"])
def test_a_store_that_fails_on_is_named_and_not_taken_for_a_damaged_file(
    failing: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    alone = replace(failing, sources=tuple(each for each in failing.sources if each.name == kind))
    lock = index(alone, Path("lock"))
    monkeypatch.setattr(Failing, "failures", 4)
    with pytest.raises(UserError, match=rf"^failing://bucket/{kind}\S*: the store failed 4 times: 503 slow down; run"):
        _build(alone, lock, tmp_path)
    monkeypatch.setattr(Failing, "info", Tagged.info)
    monkeypatch.setattr(Failing, "_open", lambda self, path, *a, **o: FailingFile(Tagged._open(self, path), path))
    with pytest.raises(UserError, match=rf"^failing://bucket/{kind}\S*: the store failed 4 times: 503 slow down; run"):
        _build(alone, lock, tmp_path)


@in_memory
def test_what_a_store_refuses_is_asked_once(failing: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def refuse(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise PermissionError("403 not yours")

    monkeypatch.setattr(Failing, "find", refuse)
    with pytest.raises(UserError, match=r"^failing://bucket/web: cannot be read: 403 not yours"):
        list_remote(failing.sources[1].paths[0])
    assert len(calls) == 1


@in_memory
def test_small_files_of_a_store_are_asked_for_side_by_side(failing: CorpusConfig, tmp_path: Path) -> None:
    lock = index(failing, Path("lock"))
    Failing.together = 0
    _build(failing, lock, tmp_path)
    assert Failing.together > 1


def test_a_missing_package_and_an_unknown_store_are_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^s3://bucket/a: needs a package that is not installed: Install s3fs"
    ) as refused:
        list_remote("s3://bucket/a")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"^nowhere://a: cannot be read: Protocol not known: nowhere"):
        list_remote("nowhere://a")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"lfs": {"sha256": "ab"}, "blob_id": "cd"}, "sha256:ab"),
        ({"blob_id": "cd", "lfs": None}, "git:cd"),
        ({"generation": "17", "etag": "x"}, "generation:17"),
        ({"ETag": '"d41d-2"'}, "etag:d41d-2"),
        ({"created": 5}, None),
    ],
)
def test_identities_of_the_stores(info: dict[str, Any], expected: str | None) -> None:
    assert identity(info) == expected


def test_the_hub_is_listed_and_read_with_its_own_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub() as hub:
        for key, value in hub.environment().items():
            monkeypatch.setenv(key, value)
        small, large = Blob(b'{"text": "a"}\n{"text": "b"}\n', lfs=False), Blob(b'{"text": "c"}\n', lfs=True)
        repository = hub.repositories["me/words"] = Repository(private=False)
        repository.commit({"a.jsonl": small, "deep/b.jsonl": large, "README.md": Blob(b"#", lfs=False)}, "first")
        hub.objects[large.sha256] = large.data
        code = (
            "from headrace.corpus.listing import list_user_files; from headrace.corpus.lock import content_hash; "
            "from headrace.corpus.readers import read_documents; from headrace.corpus.remote import look_up\n"
            "for found in list_user_files(['hf://me/words/**/*.jsonl']):\n"
            "    assert look_up(found.path).identity == found.identity\n"
            "    print(found.name, found.root, content_hash(found), [d.text for d in read_documents(found, 'text')])"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert run.stdout.splitlines() == [
            f"hf://me/words/a.jsonl hf://me/words git:{small.oid} ['a', 'b']",
            f"hf://me/words/deep/b.jsonl hf://me/words sha256:{large.sha256} ['c']",
        ], run.stderr
