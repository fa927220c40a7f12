"""The rendezvous: ranks that were started alike meet; otherwise every rank says why not."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple

import pytest
from torch._C._distributed_c10d import Store, TCPStore

from benchmarks.launch import free_port
from fastjepa.errors import ConfigError
from fastjepa.launch import rendezvous
from fastjepa.launch.environment import Launch
from fastjepa.launch.rendezvous import WAIT_VARIABLE, Card, contradiction, format_ranks, meet, seconds_to_wait
from tests.support.reliability import Record


def test_a_fact_that_differs_is_named_with_its_ranks_and_hosts() -> None:
    cards = [Card(r, 4, "ab"[r // 2], {"torch": "2.13" if r < 2 else "2.12", "seed": "0"}) for r in range(4)]
    assert contradiction(cards[:2]) is None
    problem = contradiction(cards)
    assert problem is not None
    assert "torch: 2.13 on ranks 0-1 (a), 2.12 on ranks 2-3 (b)" in problem
    assert "seed" not in problem


def test_a_fact_that_one_rank_lacks_differs() -> None:
    problem = contradiction([Card(0, 2, "a", {"seed": "0"}), Card(1, 2, "b", {})])
    assert problem is not None
    assert "seed: 0 on rank 0 (a), not there on rank 1 (b)" in problem


@pytest.mark.parametrize(("gpu_ids", "alike"), [("ab", True), ("aa", False), (("", ""), True)])
def test_ranks_of_one_host_need_a_gpu_each_or_none(gpu_ids: Sequence[str], alike: bool) -> None:
    cards = [Card(rank, 2, "a", {}, gpu_id=gpu_id) for rank, gpu_id in enumerate(gpu_ids)]
    assert (contradiction(cards) is None) == alike
    on_two_hosts = [Card(card.rank, 2, "ab"[card.rank], {}, gpu_id=card.gpu_id) for card in cards]
    assert contradiction(on_two_hosts) is None
    beside_another_host = [*cards, Card(2, 2, "b", {}, gpu_id="c")]
    assert (contradiction(beside_another_host) is None) == alike


def test_gpus_of_different_models_are_no_contradiction() -> None:
    assert contradiction([Card(0, 2, "a", {}, "H100", "a"), Card(1, 2, "b", {}, "A100", "b")]) is None


def test_a_card_of_another_version_can_be_read() -> None:
    """Its rank is then refused for what differs, not for a field that this version does not know."""
    card = {"rank": 2, "world_size": 4, "host": "b", "facts": {"torch": "2.12"}, "a field of a later version": 1}
    assert Card.read(json.dumps(card).encode()) == Card(2, 4, "b", {"torch": "2.12"})


def test_ranks_are_written_as_spans() -> None:
    assert format_ranks([5, 1, 2, 0]) == "ranks 0-2, 5"
    assert format_ranks([3]) == "rank 3"


def test_the_seconds_to_wait_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WAIT_VARIABLE, raising=False)
    assert seconds_to_wait() == 300.0
    monkeypatch.setenv(WAIT_VARIABLE, "")
    assert seconds_to_wait() == 300.0
    monkeypatch.setenv(WAIT_VARIABLE, "2.5")
    assert seconds_to_wait() == 2.5


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_seconds_that_cannot_be_waited_are_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"{WAIT_VARIABLE} = {value}: expected a number of seconds"):
        seconds_to_wait()


class Rank(NamedTuple):
    """A rank of `meeting`, and what it claims."""

    rank: int
    world_size: int
    torch: str = "2.13"
    gpu: str = ""
    host: str = "node1"
    master_addr: str = "127.0.0.1"


def meeting(ranks: Sequence[Rank], port: int, seconds: float = 30.0) -> list[Store | str]:
    """Let ranks meet; return each one's store, or the message that its user reads. Threads stand for processes and hosts."""
    this = threading.local()

    def one(rank: Rank) -> Store | str:
        this.host = rank.host
        launch = Launch(rank.rank, rank.world_size, rank.rank, rank.world_size, rank.master_addr, port)
        try:
            return meet(launch, {"torch": rank.torch}, seconds, gpu_id=rank.gpu)
        except ConfigError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(ranks)) as pool:
        patch.setattr(socket, "gethostname", lambda: this.host)
        patch.setattr(rendezvous, "POLL_SECONDS", 0.01)
        return list(pool.map(one, ranks))


def test_ranks_that_are_alike_meet() -> None:
    stores = meeting([Rank(0, 2, gpu="a"), Rank(1, 2, gpu="b")], free_port())
    assert not any(isinstance(store, str) for store in stores), stores


@pytest.mark.parametrize(
    ("fault", "ranks", "message"),
    [
        (
            "a rank of two with another version of torch",
            [Rank(0, 2), Rank(1, 2, torch="2.12", host="node2")],
            "the ranks are not alike: torch: 2.13 on rank 0 (node1), 2.12 on rank 1 (node2). Expected the same everywhere",
        ),
        (
            "ranks with different WORLD_SIZE",
            [Rank(0, 2), Rank(1, 3, host="node2"), Rank(2, 3, host="node2")],
            "the ranks were started with different WORLD_SIZE: 2 on rank 0 (node1), 3 on ranks 1-2 (node2)",
        ),
        (
            "a rank that is started twice",
            [Rank(0, 3), Rank(1, 3, host="node2"), Rank(1, 3, host="node2")],
            "rank 1 was started more than once (on node2, node2): give every machine its own --node_rank, and every run "
            "its own port (--master_port)",
        ),
        (
            "three ranks on a host of two GPUs (simulated)",
            [Rank(0, 3, gpu="a"), Rank(1, 3, gpu="b"), Rank(2, 3, gpu="a")],
            "there are 3 ranks but 2 GPUs on node1: expected one for each rank. --num_gpus (deepspeed), --nproc_per_node "
            "(torchrun) or --ntasks-per-node (srun) sets the ranks",
        ),
    ],
)
def test_ranks_that_were_not_started_alike_are_all_told(
    fault: str, ranks: list[Rank], message: str, record: Record
) -> None:
    told = meeting(ranks, free_port())
    assert told == [message] * len(ranks)
    record(fault, f"every rank is refused, with one line: {told[0]}", "nothing")


def test_a_rank_whose_partner_is_absent_says_who_is_missing(record: Record) -> None:
    (first,) = meeting([Rank(0, 4)], port := free_port(), seconds=0.5)
    assert first == (
        f"ranks 1-3 of 4 did not come to 127.0.0.1:{port} in time (FASTJEPA_RENDEZVOUS_SECONDS sets the seconds); 1 "
        "came from node1: see the logs of the missing ranks"
    )
    (other,) = meeting([Rank(1, 4, host="node2")], port := free_port(), seconds=0.5)
    assert other == (
        f"rank 1 on node2 could not reach 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT) within 0.5 s (Connection refused): "
        "is rank 0 running there, and is the port open to this host?"
    )
    record(
        "ranks that are not started",
        f"the others are refused after FASTJEPA_RENDEZVOUS_SECONDS, with one line: {str(first).partition(' to ')[0]}",
        "nothing",
    )


def test_rank_0_on_another_host_than_master_addr_says_where_it_runs(record: Record) -> None:
    (told,) = meeting([Rank(0, 2, master_addr="nowhere.invalid")], free_port(), seconds=0.5)
    assert isinstance(told, str)
    reason = r"\(.*[Nn]ame.*\)"
    assert re.fullmatch(
        rf"rank 0 runs on node1, which MASTER_ADDR = nowhere\.invalid does not lead to {reason}: expected rank 0's host",
        told,
    ), told
    record("MASTER_ADDR is not the host of rank 0", f"rank 0 is refused, with one line: {told}", "nothing")


def test_a_second_run_at_the_same_port_is_refused_and_the_first_goes_on(record: Record) -> None:
    run = [Rank(0, 2), Rank(1, 2, host="node2")]
    first = meeting(run, port := free_port())
    second = meeting(run, port)
    assert second == [
        f"rank 0 on node1 cannot listen on MASTER_PORT = {port} (Address already in use): another job, or another rank 0, "
        "uses it. Choose another port with --master_port (deepspeed, torchrun) or MASTER_PORT (srun)",
        f"rank 1 of 2 on node2 came to a run of 2 ranks at 127.0.0.1:{port} that is complete: either two runs use the "
        "same port (--master_port chooses another), or a rank was started with another WORLD_SIZE",
    ]
    one, two = first
    assert isinstance(one, Store)
    assert isinstance(two, Store)
    one.set("still", "here")
    assert two.get("still") == b"here"
    record(
        "a second run at the port of a living one",
        "its ranks are refused: rank 0 cannot listen on MASTER_PORT, rank 1 came to a run that is complete",
        "nothing; the first goes on",
    )


def test_a_rank_0_that_ends_while_the_ranks_meet_is_named() -> None:
    port = free_port()
    rank_0 = [TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]

    def end_once_a_card_is_there() -> None:
        rank_0[0].wait(["fastjepa 0/card 1"], timedelta(seconds=50))
        rank_0.clear()

    threading.Thread(target=end_once_a_card_is_there).start()
    (told,) = meeting([Rank(1, 2, host="node2")], port)
    assert isinstance(told, str)
    assert re.fullmatch(
        rf"rank 1 on node2 lost rank 0 \(127.0.0.1:{port}\) while the ranks met \(.*\): see what rank 0 says", told
    ), told
