"""The plan of 14.8T tokens as a graph: 55 TB of sources in 1.7 million pieces, 6,892 shards, a few thousand jobs."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.config.compose import load
from headrace.corpus.lock import Lock, LockedFile, _key, list_sources, look_at
from headrace.corpus.pieces import pieces
from headrace.corpus.seen import remember
from headrace.corpus.sources import lock_path
from project import Project

pytestmark = [pytest.mark.workflow, pytest.mark.alone]

FILES, GROUPS, GROUP_BYTES = 6_892, 250, 32_000_000
SECONDS = 15.0


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Empty files, and a lock that says what they would hold."""
    (tmp_path / "text").mkdir()
    for number in range(FILES):
        (tmp_path / "text" / f"part-{number:05d}.parquet").touch()
    monkeypatch.chdir(tmp_path)  # where snakemake will be
    config = load(["corpus=files", f"corpus.paths=[{tmp_path}/text/*.parquet]"])
    found = list_sources(config.corpus)
    lock = Lock.of(
        LockedFile(file.name, file.root, file.source, 0, f"sha256:{number:064x}", (GROUP_BYTES,) * GROUPS)
        for number, file in enumerate(found)
    )
    assert len(pieces(lock)) == FILES * GROUPS
    lock.write(lock_path(config))
    remember(lock_path(config), _key(lock, config.corpus), look_at(found), [])
    return Project(tmp_path)


def test_a_dry_run_takes_seconds_and_a_few_thousand_jobs(sources: Project) -> None:
    settings = f"corpus.paths=[{sources.folder}/text/*.parquet] tokens.total=14.8e12"
    began = time.monotonic()
    result = sources.run("tokenize", "--dry-run", "--quiet", "rules", settings=settings, config=("corpus=files",))
    seconds = time.monotonic() - began
    assert result.returncode == 0, result.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout + result.stderr, re.MULTILINE))
    bare = seconds_of_a_bare_graph(sources.folder / "bare", int(jobs["total"]))
    print(f"{jobs}, {seconds:.1f} s, {seconds / bare:.2f} of as many jobs of one rule")
    assert (jobs["corpus_scans"], jobs["tokenize_shards"], jobs["tokenize_plan"]) == ("862", "1149", "1")
    assert seconds < SECONDS


def seconds_of_a_bare_graph(folder: Path, jobs: int) -> float:
    """A dry run of so many jobs that do nothing, each of one file."""
    folder.mkdir()
    (folder / "Snakefile").write_text(
        f'rule all:\n    input: expand("{{n}}.done", n=range({jobs}))\n'
        'rule one:\n    output: "{n}.done"\n    shell: "touch {output}"\n'
    )
    began = time.monotonic()
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--quiet", "rules"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.monotonic() - began
