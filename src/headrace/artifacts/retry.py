"""Patience with a disk that fails for a moment, and none with one that is full.

Network file systems answer EIO, ESTALE or EROFS while a server restarts or a path fails over. Such an operation is done
again from its beginning, a few times with growing pauses (an fsync that failed may have dropped the pages it was asked
to keep, so writing goes on from the first byte). A full disk does not empty itself: ENOSPC fails at once.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

PASSING = frozenset({errno.EIO, errno.EROFS, errno.ESTALE})
PAUSES = (0.5, 2.0, 5.0)
"""Seconds before each further attempt."""
_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def _passes(error: OSError) -> bool:
    return error.errno in PASSING


def retried(act: Callable[[], _Result], what: str, may_pass: Callable[[OSError], bool] = _passes) -> _Result:
    """`act()`, tried again after errors that may pass; `what` names it in the log. The last error is raised."""
    for pause in PAUSES:
        try:
            return act()
        except OSError as error:
            if not may_pass(error):
                raise
            _LOG.warning("%s: %s; trying again in %g s", what, error, pause)
        time.sleep(pause)
    return act()
