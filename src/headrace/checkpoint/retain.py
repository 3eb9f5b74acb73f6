"""Which checkpoints stay: the newest few, every n-th for good, and those that the run may have to go back to.

Only whole checkpoints count as "the newest few", so a damaged one never pushes a good one out. What is found wrong
later may lead behind all of these: the newest whole ones up to there stay as well. Removal happens after a save has
been published, so a failing save removes nothing.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from headrace.checkpoint.reader import checkpoint_folder, open_checkpoint, steps
from headrace.checkpoint.writer import remove
from headrace.errors import UserError

_LOG = logging.getLogger(__name__)


def retain(
    folder: Path,
    keep: int,
    keep_every: int | None,
    known: dict[str, bool] | None = None,
    back_to: Collection[int] = (),
) -> list[int]:
    """Delete checkpoints older than the `keep` newest whole ones, sparing steps that `keep_every` divides.

    known: by the hash of a manifest, whether all that it lists is whole, as far as this process has written or read it;
    what is not in it is read and added. back_to: steps that the run may have to go back to; the newest whole
    checkpoint up to each of them stays. Returns the steps that were deleted. Nothing is deleted while fewer than
    `keep` whole checkpoints exist. What cannot be deleted is said and stays.
    """
    assert keep >= 1
    known = {} if known is None else known
    deleted, whole, wanted = [], 0, set(back_to)
    for step in reversed(steps(folder)):
        path = checkpoint_folder(folder, step)
        served = {goal for goal in wanted if step <= goal}
        if whole < keep or served:
            if _is_whole(path, known):
                whole, wanted = whole + 1, wanted - served
        elif not (keep_every and step % keep_every == 0):
            try:
                remove(path)
                deleted.append(step)
            except OSError as error:
                _LOG.warning("the checkpoint of step %d cannot be deleted: %s", step, error)
    return deleted


def _is_whole(path: Path, known: dict[str, bool]) -> bool:
    try:
        found = open_checkpoint(path)
        if found.manifest_hash not in known:
            known[found.manifest_hash] = False
            found.verify()
            known[found.manifest_hash] = True
    except UserError:
        return False
    return known[found.manifest_hash]
