"""Which checkpoints stay: the newest few, every n-th for good, and always the last whole one.

Only whole checkpoints count as "the newest few", so a damaged one never pushes a good one out. Removal happens after
a save has been published, so a failing save removes nothing.
"""

from pathlib import Path

from headrace.checkpoint.store import checkpoint_folder, load, remove, steps
from headrace.errors import UserError


def retain(folder: Path, keep: int, keep_every: int | None) -> list[int]:
    """Delete checkpoints older than the `keep` newest whole ones, sparing steps that `keep_every` divides.

    Returns the steps that were deleted. Nothing is deleted while fewer than `keep` whole checkpoints exist.
    """
    assert keep >= 1
    deleted, whole = [], 0
    for step in reversed(steps(folder)):
        path = checkpoint_folder(folder, step)
        if whole < keep:
            whole += _is_whole(path)
        elif not (keep_every and step % keep_every == 0):
            remove(path)
            deleted.append(step)
    return deleted


def _is_whole(path: Path) -> bool:
    try:
        load(path)
    except UserError:
        return False
    return True
