"""Connections that are reset, cut, lossy or late between ranks, and rendezvous of ranks that have just died."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults.conftest import Fresh
from faults.kills import check_nothing_is_left
from faults.product import Product, Stage, wait_for
from headrace.launch.blame import RankFailure
from headrace.launch.deadline import Deadline
from headrace.launch.start import started
from headrace.launch.supervisor import supervise

pytestmark = [pytest.mark.faults, pytest.mark.alone]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change networks")
NETWORK = f"headrace-faults-{os.getpid()}"
TOY = Path(__file__).with_name("toy_ranks.py")


def ends_like(product: Product, stage: Stage, undisturbed: Product) -> None:
    assert stage.wait() == 0, stage.said
    assert product.differences(undisturbed) == []
    check_nothing_is_left(product)


@as_root
def test_connections_reset_in_each_phase_of_dualpipe_cost_a_restart_each(
    fresh: Fresh, undisturbed: Product, tmp_path: Path
) -> None:
    at = {"F": 9, "B": 11, "OVERLAP_F_B": 13, "W": 17}
    product = fresh().taking_up(undisturbed, 8).with_fault("reset", rank=1, at=at, once=str(tmp_path / "once"))
    ends_like(product, product.start(), undisturbed)
    assert sorted(path.suffix for path in tmp_path.glob("once*")) == sorted(f".{kind}" for kind in at)
    failures = product.events("failure")
    assert [failure["step"] + 1 for failure in failures] == list(at.values())
    assert all(failure["detect"] < 30 for failure in failures)


@pytest.fixture
def network() -> Iterator[tuple[str, ...]]:
    """A network of its own, with nothing but a loopback interface; the words that run a command in it."""
    words = ("ip", "netns", "exec", NETWORK)
    subprocess.run(["ip", "netns", "add", NETWORK], check=True)
    try:
        within(words, "ip link set lo up mtu 1500 gso_max_segs 1")  # what is sent is counted by what is lost: packets
        yield words
    finally:
        subprocess.run(["ip", "netns", "delete", NETWORK], check=True)


def within(network: tuple[str, ...], command: str) -> str:
    return subprocess.run([*network, *command.split()], check=True, capture_output=True, text=True).stdout


ONE_IN_FIVE = "4,32 0 0 4294963256,53 1 0 858993459,6 0 0 65538,6 0 0 0"
"""For the kernel's packet filter: draw a number; below a fifth of 2^32 the packet is of class 1:2, else of no class."""


@as_root
def test_a_wire_that_loses_packets_changes_no_bit(fresh: Fresh, undisturbed: Product, network: tuple[str, ...]) -> None:
    """No netem in this kernel; a class of packets whose queue has no room is lost as well, and TCP sends it again."""
    product = fresh().taking_up(undisturbed, 8).but(prefix=network)
    stage = product.start()
    stage.until_step(10)
    within(network, "tc qdisc add dev lo root handle 1: htb default 1")
    for queue in ("1:1", "1:2"):
        within(network, f"tc class add dev lo parent 1: classid {queue} htb rate 10gbit")
    within(network, "tc qdisc add dev lo parent 1:2 bfifo limit 1")
    filters = ["tc", "filter", "add", "dev", "lo", "parent", "1:", "protocol", "all", "bpf", "bytecode"]
    subprocess.run([*network, *filters, ONE_IN_FIVE], check=True)
    stage.until_step(12, seconds=180)
    said = within(network, "tc -s qdisc show dev lo")
    dropped, sent = int(said.partition("dropped ")[2].split(",")[0]), int(said.partition(" bytes ")[2].split()[0])
    print(f"{dropped} packets of {sent + dropped} dropped")
    assert dropped > 100
    assert 0.17 < dropped / (sent + dropped) < 0.23
    within(network, "tc qdisc delete dev lo root")
    ends_like(product, stage, undisturbed)


@as_root
def test_a_rank_that_cannot_be_reached_is_named_and_all_meet_again(
    fresh: Fresh, undisturbed: Product, network: tuple[str, ...], tmp_path: Path
) -> None:
    once = tmp_path / "once"
    product = fresh("launch.hang_seconds=6").but(prefix=network).taking_up(undisturbed, 8)
    stage = product.with_fault("partition", rank=1, step=10, kind="F", once=str(once)).start()
    stage.until_step(9)
    ranks = stage.both_ranks()
    wait_for(lambda: once.exists() or None, 60, stage)
    began = time.monotonic()
    _, alive = psutil.wait_procs(ranks.values(), timeout=60)
    assert alive == [], stage.said
    assert time.monotonic() - began < 6 + 10
    ends_like(product, stage, undisturbed)
    [failure] = product.events("failure")
    peer = 1 - failure["rank"]
    found = re.fullmatch(r"has waited for \d+ s in \dRECV_[FB]\d of step 10, for rank (\d), .*", failure["what"])
    assert found, failure["what"]
    assert int(found[1]) == peer


def test_rendezvous_of_ranks_that_have_just_died_succeed_one_after_the_other(tmp_path: Path) -> None:
    for attempt in range(int(os.environ.get("RENDEZVOUS", "15"))):
        assert sums_before_death(tmp_path) == [2.0], attempt


def sums_before_death(logs: Path) -> list[Any]:
    """What the ranks of the toy program computed together before one of them died, as the other one tells it."""
    told: list[Any] = []
    with started([str(TOY)], 2, "local", logs) as ranks, pytest.raises(RankFailure, match="rank 1 was killed by SIGK"):
        supervise(ranks, lambda rank, kind, payload: told.append(payload), Deadline(None), 20)
    return told
