"""A rank's own side: what it takes for another rank's fault. The rest is in test_supervisor.py."""

import pytest
from torch import distributed

from headrace.launch.rank import another_left


def chained(cause: Exception) -> Exception:
    error = ValueError("the action failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38433"), True),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"), True),
        (ConnectionResetError("reset"), True),
        (distributed.DistNetworkError("failed to recv"), True),
        (chained(RuntimeError("Read error [127.0.0.1]:3: Connection reset by peer")), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"), False),
        (RuntimeError("[enforce fail at pair.cc:490] op.preamble.length <= op.nbytes. 16 vs 8"), False),
        (ValueError("socket"), False),
        (chained(KeyError("layer")), False),
    ],
)
def test_only_lost_connections_are_another_ranks_fault(error: Exception, expected: bool) -> None:
    assert another_left(error) is expected
