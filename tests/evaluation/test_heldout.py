from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from evaluation_world import LENGTH, World
from headrace.errors import UserError
from headrace.evaluation import heldout


def test_all_rows_together_score_every_token_of_every_document_once(world: World) -> None:
    encoder = world.encoder()
    rows = heldout.read(world.heldout, encoder, LENGTH, 10_000)
    assert len(rows.documents) == len(world.texts)
    assert rows.text(encoder) == "".join(world.texts).encode()
    assert rows.sizes.sum() == len("".join(world.texts).encode())
    for place, document in enumerate(rows.documents):
        ids = encoder.encode([world.texts[document.id]])[0]
        own = np.flatnonzero(rows.owner == place)
        targets = np.concatenate([rows.tokens[row, 1 : 1 + rows.lengths[row]] for row in own])
        assert targets.tolist() == ids.tolist()
        contexts = [encoder.eos, *ids[LENGTH - 1 : -1 : LENGTH].tolist()]
        assert rows.tokens[own, 0].tolist() == contexts[: len(own)]
    assert rows.mask.sum() == rows.lengths.sum()


def test_the_draw_repeats_and_comes_from_many_documents(world: World) -> None:
    encoder = world.encoder()
    first, second = (heldout.read(world.heldout, encoder, LENGTH, 20) for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens) and first.documents == second.documents
    assert len(first.tokens) == 20 and len(first.documents) >= 10
    whole = heldout.read(world.heldout, encoder, LENGTH, 10_000)
    known = {tuple(row) for row in whole.tokens.tolist()}
    assert all(tuple(row) in known for row in first.tokens.tolist())


def test_text_by_kind_is_the_text_of_its_documents(world: World) -> None:
    encoder = world.encoder()
    rows = heldout.read(world.heldout, encoder, LENGTH, 30)
    assert rows.kinds == ["code", "docs"]
    sizes = rows.per_document(rows.sizes)
    for kind in rows.kinds:
        assert len(rows.text(encoder, kind)) == sizes[rows.of_kind(kind)].sum()
    assert sizes.sum() == len(rows.text(encoder))


def test_a_large_split_is_represented_by_a_pool(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout, "_BATCH", 4)
    seen: list[int] = []
    encoder = world.encoder()
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: seen.append(len(texts)) or encode(texts))
    rows = heldout.read(world.heldout, encoder, LENGTH, 1)
    assert len(rows.tokens) == 1 and sum(seen) < len(world.texts)


def test_missing_damaged_or_empty_files_are_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.parquet"):
        heldout.read(tmp_path / "nowhere.parquet", world.encoder(), LENGTH, 5)
    (tmp_path / "damaged.parquet").write_bytes(world.heldout.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"damaged\.parquet"):
        heldout.read(tmp_path / "damaged.parquet", world.encoder(), LENGTH, 5)
    columns = {
        "id": arrow.array([], arrow.int64()),
        **{name: arrow.array([], arrow.string()) for name in ("path", "kind", "text")},
    }
    parquet.write_table(arrow.table(columns), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no held-out text"):
        heldout.read(tmp_path / "empty.parquet", world.encoder(), LENGTH, 5)
