"""One job of corpus: scan some pieces of the sources. See `batches`.

python -m headrace.stages.corpus_scans 00002 corpus=files corpus.paths=[web/*.parquet]
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from headrace.config.schema import Config, CorpusConfig
from headrace.corpus.contamination import Item, Items
from headrace.corpus.item_files import items_in, read_items, write_items
from headrace.corpus.lock import Lock
from headrace.corpus.pieces import Piece, pieces
from headrace.corpus.scan import Scanner, scan_each
from headrace.stages.batches import Batches, Job, run
from headrace.stages.places import Place
from headrace.stages.run import held

ITEMS = "items.jsonl"


def scan_folder(run_folder: Path) -> Path:
    """Where scans lie."""
    return run_folder / "scans"


def task_items(config: CorpusConfig) -> list[Item]:
    """The evaluation items that training text must not contain, each once."""
    from headrace.evaluation.items import texts_of  # only where it is wanted

    items = [Item(id_, text) for task in dict.fromkeys(config.contamination_tasks) for id_, text in texts_of(task)]
    own = {item.id for item in items}
    others = read_items(config.contamination_items) if config.contamination_items else []
    return items + [item for item in others if item.id not in own]


def sought_items(config: CorpusConfig, place: Place) -> list[Item]:
    """The same from the run folder's file of them, which whoever comes first writes: puzzles take seconds to make."""
    path = place.folder / ITEMS
    if not (config.contamination_tasks or config.contamination_items):
        return []
    if not path.exists():
        with held(place, "items"):
            if not path.exists():
                write_items(path, task_items(config))
    return items_in(path.read_bytes(), str(path))


def _make(job: Job, units: Sequence[Piece]) -> Iterator[str]:
    config, folder = job.config.corpus, scan_folder(job.place.folder)
    folder.mkdir(exist_ok=True)
    items = sought_items(config, job.place)
    scanner = Scanner(config, job.lock, Items(items) if items else None)
    for piece, _ in zip(units, scan_each(scanner, units, folder, job.name), strict=True):
        yield f"piece {piece.name} of {piece.source} scanned"


def _all_pieces(config: Config, lock: Lock, place: Place) -> Sequence[Piece]:
    return pieces(lock)


BATCHES = Batches(
    stage="corpus",
    program="corpus_scans",
    per_job=lambda config: config.launch.pieces_per_job,
    units=_all_pieces,
    finished=lambda place, piece: (scan_folder(place.folder) / f"{piece.name}.parquet").exists(),
    make=_make,
    unit_name=lambda piece: piece.name,
)

if __name__ == "__main__":
    run(BATCHES)
