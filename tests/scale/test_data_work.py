"""200 MB through the data stages: the same bytes for any number of workers, and after ten kills. 10 GB: `full.py`."""

from pathlib import Path

import pytest

from scale.data_work import Work, write_text

MEGABYTES = 200
MEMORY = 2 << 30


@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_workers_and_kills_change_no_byte_and_memory_is_bounded(tmp_path: Path) -> None:
    write_text(tmp_path / "text", MEGABYTES)
    settings = ("tokens.shards=10", "launch.shards_per_job=2", "launch.pieces_per_job=3")
    works = [Work(tmp_path / "text", tmp_path / f"{workers}", workers, settings) for workers in (1, 2, 3)]
    undisturbed, killed, three = works
    undisturbed.run()
    killed.run(kills=10, within=0.6 * undisturbed.seconds)
    three.run()
    assert killed.kills == 10
    assert undisturbed.done == killed.done == three.done
    assert undisturbed.content == killed.content == three.content
    assert [work.leftovers for work in works] == [[], [], []]
    assert max(work.most_memory for work in works) < MEMORY
    for work in works:
        assert work.most_together > (work.workers - 1) * 50_000_000  # else nothing was summed
        print(f"{work.workers} workers: {work.most_memory:,} bytes in one process, {work.most_together:,} in all")
