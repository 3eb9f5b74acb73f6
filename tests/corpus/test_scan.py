"""Scans: functions of piece and settings, made in any order by any number of workers, or not at all."""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from headrace.artifacts.files import hash_file
from headrace.config.schema import CorpusConfig
from headrace.corpus import readers
from headrace.corpus import scan as scan_module
from headrace.corpus.build import build_corpus, select_corpus
from headrace.corpus.documents import selected_documents
from headrace.corpus.extract import extract
from headrace.corpus.lock import Lock, build_lock
from headrace.corpus.pieces import pieces
from headrace.corpus.scan import Scanner, read_summary, scan_each
from headrace.corpus.scan_columns import read_columns, read_signatures
from headrace.corpus.selection import Selection
from headrace.corpus.split import SPLITS
from headrace.errors import UserError

PIECE = 20_000  # bytes, so that the small corpus has some twenty pieces


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path, "sha256") for path in sorted(folder.iterdir())}


def scan_some(config: CorpusConfig, lock: Lock, numbers: Sequence[int], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    cut = pieces(lock, PIECE)
    return [Scanner(config, lock).scan(cut[number], folder) for number in numbers]


def test_any_order_and_any_number_of_workers_give_the_same_corpus(mixed: CorpusConfig, tmp_path: Path) -> None:
    lock = build_lock(mixed)
    cut = pieces(lock, PIECE)
    assert len(cut) > 12
    (tmp_path / "whole").mkdir()
    summary = build_corpus(mixed, lock, tmp_path / "whole", print, piece_bytes=PIECE, scans=tmp_path / "scans")
    for workers in (1, 3):
        numbers = list(range(len(cut)))
        random.Random(workers).shuffle(numbers)
        folder, out = tmp_path / f"scans{workers}", tmp_path / f"out{workers}"
        out.mkdir()
        for worker in range(workers):  # each opens its own scanner, as separate jobs do
            scan_some(mixed, lock, numbers[worker::workers], folder)
        assert hashes(folder) == hashes(tmp_path / "scans")
        again = select_corpus(mixed, lock, sorted(folder.iterdir()), out, range_documents=50)
        extract(Selection(out, lock.hash), lock, mixed, cut, out)
        assert again == summary
        whole = hashes(tmp_path / "whole")
        assert whole.pop("corpus.json") and hashes(out) == whole


def test_every_kind_of_damage_is_counted_and_shown(mixed: CorpusConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    summary = build_corpus(mixed, build_lock(mixed), tmp_path / "out", print, piece_bytes=PIECE)
    assert summary["damaged"] == {
        "web": {"text is null": 1},
        "lines": {"no field 'text'": 1, "not a JSON object": 1, "not valid JSON": 1, "text is not a string": 1},
        "notes": {"not UTF-8": 1},
    }
    assert summary["damaged_examples"]["lines"] == [
        "lines/a.jsonl:61: not valid JSON (unexpected end of data)",
        "lines/b.jsonl.gz:71: no field 'text' (there are ['body'])",
        "lines/c.jsonl.zst:31: not a JSON object",
        "lines/c.jsonl.zst:32: text is not a string (int)",
    ]
    assert summary["documents"] == 400 + 200 + 48
    assert summary["dropped"] == {"exact duplicate": 10 + 11}


def test_a_wrong_field_stops_at_the_first_piece(mixed: CorpusConfig, tmp_path: Path) -> None:
    Path("lines/a.jsonl").write_bytes(b'{"text": "x"}\n' * 10_001)
    sources = (replace(mixed.sources[1], text_field="body"),)
    wrong = replace(mixed, sources=sources)
    message = (
        r"a\.jsonl:10000: no field 'body' \(there are \['text'\]\): none of the first 10,000 documents can be read"
    )
    with pytest.raises(UserError, match=message):
        scan_some(wrong, build_lock(wrong), [0], tmp_path / "scans")
    all_may_be = replace(wrong, max_damaged_fraction=1.0)
    (path,) = scan_some(all_may_be, build_lock(wrong), [0], tmp_path / "scans")
    assert read_summary(path).damaged == {"no field 'body'": 10_001}


def test_a_wrong_field_of_small_files_is_told_after_the_scans(mixed: CorpusConfig, tmp_path: Path) -> None:
    wrong = replace(mixed, sources=(replace(mixed.sources[1], text_field="body"),))
    Path("lines/b.jsonl.gz").unlink()  # one of its lines has the field
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"^lines/a\.jsonl:1: no field 'body'.*max_damaged_fraction=0\.1; none can be"):
        build_corpus(wrong, build_lock(wrong), tmp_path / "out", print)


@pytest.mark.parametrize("line", [b'{"text": null}\n', b'{"body": "x"}\n', b"cut\n"])
def test_damage_at_the_beginning_is_counted_like_damage_anywhere(
    mixed: CorpusConfig, tmp_path: Path, line: bytes
) -> None:
    good = b"".join(b'{"text": "a good line, number %d"}\n' % number for number in range(900))
    Path("lines/a.jsonl").write_bytes(line * 100 + good)
    sources = (replace(mixed.sources[1], paths=("lines/a.jsonl",)),)
    one = replace(mixed, sources=sources)
    (tmp_path / "out").mkdir()
    summary = build_corpus(one, build_lock(one), tmp_path / "out", print)
    assert summary["documents"] == 900 and list(summary["damaged"]["lines"].values()) == [100]
    with pytest.raises(UserError, match=r"100 of 1,000 documents of the source lines are damaged, more than"):
        build_corpus(replace(one, max_damaged_fraction=0.05), build_lock(one), tmp_path / "out", print)


def test_a_plain_file_that_is_too_long_is_counted_and_never_read(
    mixed: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("notes/5/book.txt").write_bytes(b"x" * 5_000 + b"\xff")  # a byte that reading it would stumble over
    config = replace(mixed, max_document_bytes=5_000)
    opened: list[str] = []
    original = readers._open
    monkeypatch.setattr(readers, "_open", lambda found: (opened.append(found.name), original(found))[1])
    (tmp_path / "out").mkdir()
    lock = build_lock(config)
    summary = build_corpus(config, lock, tmp_path / "out", print, piece_bytes=PIECE)
    assert summary["dropped"] == {"exact duplicate": 21, "longer than max_document_bytes": 1}
    assert summary["damaged"]["notes"] == {"not UTF-8": 1} and summary["documents"] == 648
    got = [
        row
        for split in SPLITS
        for row in selected_documents(tmp_path / "out", lock, config, pieces(lock, PIECE), split)
    ]
    assert len(got) == 648 and "notes/5/0.txt" in opened and "notes/5/book.txt" not in opened


def test_a_killed_scan_leaves_nothing_and_the_next_one_is_the_same(mixed: CorpusConfig, tmp_path: Path) -> None:
    lock = build_lock(mixed)
    undisturbed = hashes(scan_some(mixed, lock, range(3), tmp_path / "undisturbed")[0].parent)
    folder = tmp_path / "killed"
    folder.mkdir()
    child = os.fork()
    if child == 0:  # dies at the twentieth document of the second piece
        read = scan_module.read_piece

        def dying(lock, piece, field, most):  # type: ignore[no-untyped-def]
            for number, each in enumerate(read(lock, piece, field, most)):
                if piece.number == 1 and number == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield each

        scan_module.read_piece = dying
        scan_some(mixed, lock, range(3), folder)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == ["0000000.parquet"]
    scan_some(mixed, lock, range(3), folder)
    assert hashes(folder) == undisturbed


def test_kills_at_random_moments(mixed: CorpusConfig, tmp_path: Path) -> None:
    """Real processes, killed by a clock: whatever they leave, the corpus made afterwards is the undisturbed one."""
    lock = build_lock(mixed)
    lock.write(tmp_path / "lock")
    (tmp_path / "undisturbed").mkdir()
    build_corpus(mixed, lock, tmp_path / "undisturbed", print, piece_bytes=PIECE)
    code = (
        "import sys; from pathlib import Path; from headrace.corpus.build import build_corpus; "
        "from headrace.corpus.lock import read; from headrace.config.compose import load; "
        "from test_scan_config import config; Path('killed').mkdir(exist_ok=True); print('go', flush=True); "
        f"build_corpus(config, read(Path('lock')), Path('killed'), print, piece_bytes={PIECE}, scans=Path('scans'))"
    )
    Path("test_scan_config.py").write_text(f"from headrace.config.schema import *\nconfig = {mixed!r}\n")
    generator = random.Random(7)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"go\n"
        try:
            process.wait(generator.uniform(0.02, 0.5))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    build_corpus(mixed, lock, tmp_path / "killed", print, piece_bytes=PIECE, scans=tmp_path / "scans")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "undisturbed")
    assert not list((tmp_path / "scans").glob(".*"))


def test_a_scan_that_is_there_is_used_and_one_of_other_inputs_or_damaged_is_made_again(
    mixed: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = build_lock(mixed)
    read: list[int] = []
    original = scan_module.read_piece
    monkeypatch.setattr(scan_module, "read_piece", lambda *a: (read.append(a[1].number), original(*a))[1])
    paths = scan_some(mixed, lock, [0, 1], tmp_path / "scans")
    before = hashes(tmp_path / "scans")
    scan_some(mixed, lock, [0, 1], tmp_path / "scans")
    assert read == [0, 1]
    paths[1].write_bytes(paths[1].read_bytes()[:-50])
    scan_some(mixed, lock, [0, 1], tmp_path / "scans")
    assert read == [0, 1, 1] and hashes(tmp_path / "scans") == before
    scan_some(replace(mixed, max_bytes=5, heldout_fraction=0.3), lock, [0], tmp_path / "scans")  # not a scan's matter
    assert read == [0, 1, 1]
    scan_some(replace(mixed, min_document_bytes=100), lock, [0], tmp_path / "scans")
    assert read == [0, 1, 1, 0]


def test_a_bit_flipped_anywhere_in_a_scan_is_told_and_the_scan_made_again(
    mixed: CorpusConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = build_lock(mixed)
    (path,) = scan_some(mixed, lock, [0], tmp_path / "scans")
    whole = path.read_bytes()
    generator = random.Random(3)
    for place in [*generator.sample(range(len(whole)), 12), len(whole) // 4, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        for read in (read_columns, read_summary, read_signatures):
            with pytest.raises(UserError, match=rf"{path.name}: damaged"):
                read(path)
        caplog.clear()
        scan_some(mixed, lock, [0], tmp_path / "scans")
        assert path.read_bytes() == whole
        assert [record.getMessage() for record in caplog.records] == [f"{path}: damaged; it is made again"]


def test_a_changed_and_a_vanished_source_are_named(mixed: CorpusConfig, tmp_path: Path) -> None:
    lock = build_lock(mixed)
    cut = pieces(lock, PIECE)
    of_lines = next(piece for piece in cut if piece.source == "lines")
    data = bytearray(Path("lines/a.jsonl").read_bytes())
    data[12] ^= 1
    Path("lines/a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=r"^lines/a\.jsonl changed since it was indexed; run `headrace index`"):
        scan_some(mixed, lock, [of_lines.number], tmp_path / "scans")
    Path("lines/a.jsonl").unlink()
    with pytest.raises(UserError, match=r"^lines/a\.jsonl: indexed but no longer there"):
        scan_some(mixed, lock, [of_lines.number], tmp_path / "scans")
    later = next(piece for piece in cut if piece.source == "web" and piece.begin > 0)
    with Path("web/a.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"^web/a\.parquet changed"):
        scan_some(mixed, lock, [later.number], tmp_path / "scans")


def test_a_scan_says_what_it_was_made_from(mixed: CorpusConfig, tmp_path: Path) -> None:
    lock = build_lock(mixed)
    (path,) = scan_some(mixed, lock, [0], tmp_path / "scans")
    summary = read_summary(path)
    assert summary.source == "web" and summary.inputs == Scanner(mixed, lock).inputs(pieces(lock, PIECE)[0])


def test_many_pieces_show_how_far_it_is_and_what_was_left_out(
    mixed: CorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = build_lock(mixed)
    cut = pieces(lock, PIECE)
    none = replace(mixed, min_document_bytes=1_000_000, max_document_bytes=2_000_000)
    paths = list(scan_each(Scanner(none, lock), cut, tmp_path, "corpus"))
    rows = sum(parquet.read_metadata(path).num_rows for path in paths)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        rf"pieces {len(cut)} of {len(cut)} \(100 %\), {rows:,} documents read at [\d,]+\.\d MB/s, "
        rf"left out: {rows:,} shorter than min_document_bytes, 1 text is null, 1 not valid JSON, 4 by 4 other rules",
        last,
    )
    (tmp_path / "one").mkdir()
    assert len(list(scan_each(Scanner(mixed, lock), cut[:1], tmp_path / "one", "corpus"))) == 1
    assert capsys.readouterr().err == ""  # soon over
