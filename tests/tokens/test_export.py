"""Others' own readers read our shards, document by document; where one is not installed, a reader of its format does.

megatron-core and datatrove are development dependencies. ai2-olmo-core 3.0.0 is none: it pins filelock, huggingface-hub
and rich to versions that ours exclude. Its format, an array of tokens and a list of `start,end`, is read here by NumPy;
the test with the package itself runs where somebody has installed it all the same.
"""

import gzip
import os
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from headrace.artifacts import manifest as manifests
from headrace.artifacts.files import write_json
from headrace.errors import UserError
from headrace.tokens.export import Format, export
from headrace.tokens.indexed import IndexedReader, IndexedWriter

EOS = 1
SHARDS = {
    "train-00000-of-00003": 300,
    "train-00001-of-00003": 0,  # more shards than documents
    "train-00002-of-00003": 1700,
    "validation-00000-of-00001": 40,
    "heldout-00000-of-00001": 1,
}
FULL = [name for name, count in SHARDS.items() if count]
FORMATS: tuple[Format, ...] = ("datatrove", "olmo", "arrow")
Documents = dict[str, list[list[int]]]


def split_of(name: str) -> str:
    return name.split("-")[0]


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Ids up to the largest of V3's; a document of nothing but its end, and one longer than all readers' windows."""
    rng = np.random.default_rng(0)
    made = {}
    for name, count in SHARDS.items():
        lengths = np.minimum(rng.lognormal(4, 1.5, count).astype(int), 20_000)
        lengths[:2] = (0, 50_000)[: len(lengths)]
        made[name] = [[*rng.integers(2, 128_815, length).tolist(), EOS] for length in lengths]
    return made


@pytest.fixture(scope="module")
def stage_folder(documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tokenize stage leaves it: `artifact` in the stage's folder."""
    folder = tmp_path_factory.mktemp("tokenize") / "artifact"
    folder.mkdir()
    splits: dict[str, Any] = {}
    for name, rows in documents.items():
        lengths = np.array([len(row) for row in rows], np.int32)
        with IndexedWriter(folder / name) as writer:
            writer.add(np.array([id_ for row in rows for id_ in row], np.int32), lengths)
        shard = {"name": name, "tokens": int(lengths.sum()), "documents": len(rows)}
        splits.setdefault(split_of(name), {"shards": []})["shards"].append(shard)
    (folder / "tokenizer.json").write_text("{}")
    write_json(folder / "dataset.json", {"eos": EOS, "tokenizer": "sha256:0123", "splits": splits})
    manifests.build(folder, kind="tokenize", producer={}, inputs={}, summary={}, algorithm="xxh3")
    return folder.parent


@pytest.fixture(scope="module")
def views(stage_folder: Path) -> dict[str, Path]:
    made = {name: stage_folder / f"as-{name}" for name in FORMATS}
    for name, out in made.items():
        export(stage_folder, out, name)  # type: ignore[arg-type]
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_views_are_hard_links_beside_small_files(
    stage_folder: Path, documents: Documents, views: dict[str, Path]
) -> None:
    for name, suffix in (("datatrove", ".ds"), ("olmo", ".npy")):
        found = sorted(path.relative_to(views[name]).as_posix() for path in views[name].rglob(f"*{suffix}"))
        assert found == sorted(f"{split_of(shard)}/{shard}{suffix}" for shard in FULL)
        for shard in FULL:
            linked, original = (
                views[name] / split_of(shard) / f"{shard}{suffix}",
                stage_folder / "artifact" / f"{shard}.bin",
            )
            assert linked.stat().st_ino == original.stat().st_ino
    for out in views.values():
        assert (out / "tokenizer.json").samefile(stage_folder / "artifact" / "tokenizer.json")
    own = [path for path in views["datatrove"].rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert sum(path.stat().st_size for path in own) < 10 * sum(map(len, documents.values())) + 1000


def test_the_summary_counts_what_is_there(stage_folder: Path, documents: Documents, tmp_path: Path) -> None:
    for name in FORMATS:
        done = export(stage_folder / "artifact", stage_folder / f"again-{name}", name)
        tokens = sum(len(row) for rows in documents.values() for row in rows)
        assert (done.shards, done.documents, done.tokens) == (4, sum(SHARDS.values()), tokens)
        assert str(stage_folder / f"again-{name}") in done.how_to_read
        first, again = (contents(stage_folder / f"{prefix}-{name}") for prefix in ("as", "again"))
        assert {path: data for path, data in first.items() if path != "export.json"} == {
            path: data for path, data in again.items() if path != "export.json"
        }


def test_what_the_tokenize_stage_writes_can_be_exported(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "artifact")
    manifests.build(tmp_path / "artifact", kind="tokenize", producer={}, inputs={}, summary={}, algorithm="xxh3")
    done = export(tmp_path, tmp_path / "out", "olmo")
    shards = list((tmp_path / "out").rglob("*.npy"))
    assert done.shards == len(shards) >= 3
    found: Counter[bytes] = Counter()
    for path in shards:
        tokens = np.memmap(path, np.uint32, mode="r")
        lines = gzip.decompress(path.with_suffix(".csv.gz").read_bytes()).decode().splitlines()
        found.update(tokens[slice(*map(int, line.split(",")))].tobytes() for line in lines)
    expected: Counter[bytes] = Counter()
    for path in dataset.glob("*.idx"):
        reader = IndexedReader(path.with_suffix(""))
        expected.update(reader.document(number).tobytes() for number in range(len(reader)))
    assert found == expected and done.documents == expected.total()


def test_megatron_reads_the_dataset_itself(stage_folder: Path, documents: Documents) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for shard in FULL:
        for mmap in (True, False):
            theirs = indexed.IndexedDataset(str(stage_folder / "artifact" / shard), mmap=mmap)
            assert len(theirs) == len(documents[shard])
            assert theirs.document_indices.tolist() == list(range(len(documents[shard]) + 1))
            for number, expected in enumerate(documents[shard]):
                assert theirs[number].dtype == np.int32 and theirs[number].tolist() == expected
                middle = len(expected) // 2
                assert theirs.get(number, offset=middle).tolist() == expected[middle:]


def test_datatrove_reads_every_document(views: dict[str, Path], documents: Documents) -> None:
    merger = pytest.importorskip("datatrove.pipeline.tokens.merger")
    for shard in FULL:
        path = views["datatrove"] / split_of(shard) / f"{shard}.ds"
        ends = merger.load_doc_ends(path.with_name(f"{path.name}.index").open("rb"))
        with path.open("rb") as file:
            found = [np.frombuffer(data, "<u4").tolist() for data in merger.get_data_reader(file, ends, nb_bytes=4)]
        assert found == documents[shard]


def test_datatrove_reads_every_window_with_positions_in_documents(views: dict[str, Path], documents: Documents) -> None:
    folder_dataset = pytest.importorskip("datatrove.utils.dataset").DatatroveFolderDataset
    for split in ("train", "validation"):
        theirs = folder_dataset(str(views["datatrove"] / split), seq_len=127, token_size=4, return_positions=True)
        seen = 0
        for shard in sorted(name for name in FULL if split_of(name) == split):
            tokens = [id_ for row in documents[shard] for id_ in row]
            positions = [place for row in documents[shard] for place in range(len(row))]
            for first in range(0, len(tokens) - 127, 128):
                item = theirs[seen]
                assert item["input_ids"].tolist() == tokens[first : first + 128]
                inside = np.array(positions[first : first + 128])
                inside[: np.argmax(inside == 0) if 0 in inside else 128] -= inside[0]  # counted from the window's start
                assert item["positions"].tolist() == inside.tolist()
                seen += 1
        assert seen == len(theirs) > 0


def test_the_index_beside_ds_holds_ends_of_documents(views: dict[str, Path], documents: Documents) -> None:
    for shard in FULL:
        path = views["datatrove"] / split_of(shard) / f"{shard}.ds"
        ends = np.fromfile(f"{path}.index", "<u8").tolist()
        tokens = np.fromfile(path, "<u4").tolist()
        assert [tokens[first:end] for first, end in pairwise([0, *ends])] == documents[shard]
        name, count, human = Path(f"{path}.metadata").read_text().split("\n")
        assert (name, int(count)) == ("sha256:0123|4", len(tokens)) and human.endswith("T")


@pytest.mark.parametrize(
    ("count", "human"), [(1, "1.00 T"), (999, "999 T"), (2_060_000, "2.06 MT"), (2**31, "2.15 GT")]
)
def test_counts_are_written_as_datatrove_writes_them(count: int, human: str) -> None:
    from headrace.tokens import export as module

    assert f"{module._metric(count)}T" == human
    humanize = pytest.importorskip("humanize")
    assert humanize.metric(count, unit="T") == human


def test_olmo_arrays_read_by_their_format(views: dict[str, Path], documents: Documents) -> None:
    for shard in FULL:
        path = views["olmo"] / split_of(shard) / f"{shard}.npy"
        tokens = np.memmap(path, np.uint32, mode="r")  # no header: the name is misleading, and theirs
        lines = gzip.decompress(path.with_suffix(".csv.gz").read_bytes()).decode().splitlines()
        bounds = [tuple(map(int, line.split(","))) for line in lines]
        assert [tokens[first:end].tolist() for first, end in bounds] == documents[shard]
        ends = (np.flatnonzero(tokens == EOS) + 1).tolist()
        assert [end for _, end in bounds] == ends  # the other way in which OLMo-core finds documents


def test_olmo_core_reads_every_document(views: dict[str, Path], documents: Documents, tmp_path: Path) -> None:
    olmo = pytest.importorskip("olmo_core.data.utils")
    numpy_dataset = pytest.importorskip("olmo_core.data.numpy_dataset")
    for shard in FULL:
        path = views["olmo"] / split_of(shard) / f"{shard}.npy"
        by_list = list(olmo.iter_document_indices(path, use_array_if_local=False, dtype=np.uint32))
        by_scan = list(olmo.iter_document_indices(path, eos_token_id=EOS, dtype=np.uint32))
        assert by_list == by_scan
        found = [olmo.load_array_slice(path, first, end, np.uint32).tolist() for first, end in by_list]
        assert found == documents[shard]
        theirs = numpy_dataset.NumpyFSLDataset(
            path, sequence_length=128, pad_token_id=2, eos_token_id=EOS, vocab_size=128_815, dtype=np.uint32
        )
        theirs.work_dir = tmp_path
        tokens = [id_ for row in documents[shard] for id_ in row]
        assert len(theirs) == len(tokens) // 128
        for number in range(len(theirs)):
            assert theirs[number]["input_ids"].tolist() == tokens[128 * number : 128 * number + 128]


def test_datasets_loads_the_arrow_files_with_their_splits(
    views: dict[str, Path], documents: Documents, tmp_path: Path
) -> None:
    found = datasets.load_dataset(str(views["arrow"]), cache_dir=str(tmp_path))
    assert set(found) == {"train", "validation", "heldout"}
    for split, rows in found.items():
        assert rows.features == datasets.Features({"input_ids": datasets.LargeList(datasets.Value("uint32"))})
        expected = [row for shard in FULL if split_of(shard) == split for row in documents[shard]]
        assert rows["input_ids"][:] == expected
    streamed = datasets.load_dataset(str(views["arrow"]), split="train", streaming=True, cache_dir=str(tmp_path))
    assert sum(len(row["input_ids"]) for row in streamed) == sum(
        len(row) for shard in FULL if split_of(shard) == "train" for row in documents[shard]
    )


def test_what_cannot_be_exported_is_refused_in_one_line(
    stage_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stage_folder / "new"
    with pytest.raises(UserError, match="--format parquet: give one of datatrove, olmo, arrow"):
        export(stage_folder, out, "parquet")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="as-olmo: already exists"):
        (stage_folder / "as-olmo").mkdir(exist_ok=True)
        export(stage_folder, stage_folder / "as-olmo", "olmo")
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        export(tmp_path, out, "olmo")
    (tmp_path / "dataset.json").write_text("{}")
    manifests.build(tmp_path, kind="corpus", producer={}, inputs={}, summary={})
    with pytest.raises(UserError, match=r"dataset\.json: not a description of token shards"):
        export(tmp_path, out, "olmo")

    def elsewhere(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    for name in ("datatrove", "olmo"):
        with pytest.raises(UserError, match=r"cannot hold a hard link to .*\.bin \(Invalid cross-device link\)"):
            export(stage_folder, out, name)  # type: ignore[arg-type]
    assert not out.exists() and not list(stage_folder.glob(".new*"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_damaged_shard_is_named_and_nothing_is_left(stage_folder: Path, tmp_path: Path, suffix: str) -> None:
    copy = tmp_path / "artifact"
    copy.mkdir()
    for path in (stage_folder / "artifact").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damaged = copy / f"train-00002-of-00003{suffix}"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    for name in FORMATS:
        with pytest.raises(UserError, match=rf"train-00002-of-00003\{suffix}: damaged"):
            export(tmp_path, tmp_path / "out", name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact"]
