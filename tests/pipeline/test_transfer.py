"""The pool of receive buffers, and what is refused before it is computed."""

from datetime import timedelta

import pytest
import torch

from headrace.parallel.mesh import Groups, Mesh
from headrace.pipeline.communication import with_communication
from headrace.pipeline.generators import generate
from headrace.pipeline.schedule import Kind
from headrace.pipeline.transfer import ReceivePool, ShapeError, Transfers, open_transfers
from ranks import run_ranks

pytestmark = pytest.mark.alone

HERE = "pipeline/test_transfer.py"
SHAPE = torch.Size((1, 2, 3))


def transfers(rank, ranks):
    mesh = Mesh(ranks, 1, 1, 1, rank)
    groups = Groups(mesh, timedelta(minutes=1))
    open_transfers(groups, mesh, [with_communication(generate("1f1b", ranks, 2))])
    return Transfers(groups, mesh, SHAPE, torch.float32, torch.device("cpu"))


def test_a_pool_makes_as_many_buffers_as_are_used_at_once():
    made = []

    def make():
        made.append(torch.empty(SHAPE))
        return made[-1]

    pool = ReceivePool(make)
    first, second = pool.take(), pool.take()
    pool.give(first)
    third = pool.take()
    assert third is first
    assert third is not second
    assert (len(made), pool.peak, pool.in_use) == (2, 2, 2)


def test_another_shape_is_refused_with_the_action():
    with pytest.raises(
        ShapeError, match=r"^2F7 of step 3: hidden states of \[1, 2, 4\] where the step has \[1, 2, 3\]$"
    ):
        transfers(0, 1).check(torch.Size((1, 2, 4)), "2F7 of step 3")


def test_a_buffer_that_is_never_given_back_is_noticed():
    kept = transfers(0, 1)
    kept.pool.take()
    with pytest.raises(AssertionError, match="not given back"):
        kept.finish()


def exchange(rank, world):
    """Both ranks send two hidden states and a gradient before any receive; what arrives, in the order it was asked for.

    Gradients are asked for first though they were sent last: kinds do not wait for each other.
    """
    mine, other = transfers(rank, world), 1 - rank
    for value, kind in ((1, Kind.SEND_F), (2, Kind.SEND_F), (3, Kind.SEND_B)):
        mine.send(torch.full(SHAPE, 10.0 * rank + value), other, kind)
    got = [mine.receive(other, kind) for kind in (Kind.RECV_B, Kind.RECV_F, Kind.RECV_F)]
    for receiving in got:
        receiving.work.wait()
    values = [receiving.buffer.unique().tolist() for receiving in got]
    for receiving in got:
        mine.pool.give(receiving.buffer)
    mine.finish()
    return values, mine.pool.peak, [receiving.source for receiving in got]


def test_messages_arrive_in_order_per_kind_and_sends_do_not_block():
    for rank, (values, peak, sources) in enumerate(run_ranks(2, HERE, "exchange")):
        theirs = 10 * (1 - rank)
        assert values == [[theirs + 3], [theirs + 1], [theirs + 2]]
        assert peak == 3
        assert sources == [1 - rank] * 3
