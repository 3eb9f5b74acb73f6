"""Pieces: a function of the lock, that covers every file and row group once and in order."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.corpus.lock import Lock, LockedFile
from headrace.corpus.pieces import count, pieces

FILES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.sampled_from([".txt", ".txt", ".py", ".jsonl", ".jsonl.zst", ".parquet"]),
        st.integers(0, 100),
        st.lists(st.integers(0, 100), min_size=1, max_size=8),
    ),
    max_size=30,
)


def lock_of(files: list[tuple[str, str, int, list[int]]]) -> Lock:
    ordered = sorted(files, key=lambda file: file[0])
    return Lock.of(
        LockedFile(f"{number:03d}{kind}", ".", source, size, "sha256:0", tuple(groups) if kind == ".parquet" else ())
        for number, (source, kind, size, groups) in enumerate(ordered)
    )


@given(FILES, st.integers(1, 150))
def test_they_cover_all_once_in_order_within_one_source_and_their_size(
    files: list[tuple[str, str, int, list[int]]], most: int
) -> None:
    lock = lock_of(files)
    cut = pieces(lock, most)
    assert count(lock, most) == len(cut)
    assert pieces(Lock(lock.body), most) == cut
    assert [piece.number for piece in cut] == list(range(len(cut)))
    covered = []
    for piece in cut:
        inside = lock.files[piece.first : piece.last]
        assert {file.source for file in inside} == {piece.source}
        if piece.groups is None:
            covered += [(file.name, None) for file in inside]
            many = len(inside) > 1
            assert not many or all(file.name.endswith((".txt", ".py")) for file in inside)
            assert not many or sum(file.size for file in inside) <= most
        else:
            (file,) = inside
            covered += [(file.name, group) for group in piece.groups]
            assert len(piece.groups) == 1 or sum(file.row_groups[g] for g in piece.groups) <= most
    expected = [(f.name, g) for f in lock.files for g in (range(len(f.row_groups)) if f.row_groups else [None])]
    assert covered == expected


def test_a_run_ends_where_the_next_would_not_fit() -> None:
    lock = lock_of([("a", ".txt", size, [1]) for size in (10, 10, 15, 40, 5, 5)])
    assert [(piece.first, piece.last) for piece in pieces(lock, 35)] == [(0, 3), (3, 4), (4, 6)]
    groups = Lock.of([LockedFile("a.parquet", ".", "a", 9, "sha256:0", (10, 10, 15, 40, 5, 5))])
    assert [(piece.begin, piece.end) for piece in pieces(groups, 35)] == [(0, 3), (3, 4), (4, 6)]


def test_a_streamed_dataset_is_cut_by_its_shards() -> None:
    name = "datasets://a/b?split=train&revision=" + "0" * 40
    lock = Lock.of([LockedFile(name, "datasets://a", "a", 0, "revision:0", (0, 0, 0))])
    assert [(piece.begin, piece.end) for piece in pieces(lock)] == [(0, 1), (1, 2), (2, 3)]
