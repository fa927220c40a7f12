"""The rendezvous: all ranks meet and compare how they were started, before a collective could hang or fail obscurely.

Each rank puts a card into the store of rank 0 (or of torchrun): its rank and host, how it was started, its versions and
settings. Rank 0 reads the cards and writes one answer for all ranks: go on, or the reason why not.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from fastjepa.errors import ConfigError
from fastjepa.launch.environment import Launch

logger = logging.getLogger(__name__)

WAIT_VARIABLE = "FASTJEPA_RENDEZVOUS_SECONDS"
# A mistake is often made on several ranks: after the first wrong card, rank 0 waits this long for the others.
GRACE_SECONDS = 3.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Card:
    """The facts that a rank tells rank 0 of itself."""

    rank: int
    world_size: int
    host: str
    facts: dict[str, str]
    """Versions and settings, which must be the same on all ranks."""
    gpu: str = "none"
    """Model of the GPU. Different models are allowed: the slowest sets the pace."""
    gpu_id: str = ""
    """Identity of the GPU, which no other rank may use; empty on a CPU."""

    @staticmethod
    def read(text: bytes) -> Card:
        """Parse a card. Unknown fields are dropped: a rank of another version is refused for its facts, not for its card."""
        return Card(**{name: value for name, value in json.loads(text).items() if name in Card.__dataclass_fields__})


@dataclass(frozen=True)
class Answer:
    """The answer of rank 0 to all ranks."""

    problem: str | None
    cards: int
    """Number of cards that rank 0 read. A rank whose card came later does not belong to this run."""


def meet(launch: Launch, facts: Mapping[str, str], seconds: float, *, gpu: str = "none", gpu_id: str = "") -> Store:
    """Wait until all ranks are there and agree, and return the store that they share.

    Args:
        launch: how this process was started.
        facts: values that must be the same on all ranks.
        seconds: how long rank 0 waits for the others.
        gpu: model of this rank's GPU.
        gpu_id: identity of this rank's GPU; empty on a CPU.

    Raises:
        ConfigError: ranks did not arrive in time, or were not started alike. Every rank that can be reached gets it.
    """
    end = time.monotonic() + seconds
    try:
        store = _open_store(launch, seconds)
        ticket = store.add("cards", 1)
        card = Card(launch.rank, launch.world_size, socket.gethostname(), dict(facts), gpu, gpu_id)
        store.set(f"card {ticket}", json.dumps(card.__dict__))
        if launch.rank == 0:
            answer = _answer_all(store, launch, end)
            # The store ends with this process: keep it until the others have read the answer.
            _wait_until(lambda: store.add("heard", 0) >= answer.cards - 1, 2 * GRACE_SECONDS)
        else:
            answer = _await_answer(store, launch, seconds)
            store.add("heard", 1)
    except dist.DistError as error:
        raise ConfigError(
            f"rank {launch.rank} on {socket.gethostname()} lost rank 0 ({_place(launch)}) while the ranks met "
            f"({str(error).splitlines()[0]}): see what rank 0 says"
        ) from error
    problem = answer.problem
    if not problem and ticket > answer.cards:
        problem = (
            f"rank {launch.rank} of {launch.world_size} on {card.host} came to a run of {answer.cards} ranks at "
            f"{_place(launch)} that is complete: either two runs use the same port (--master_port chooses another), or a "
            "rank was started with another WORLD_SIZE"
        )
    if problem:
        raise ConfigError(problem)
    return store


def seconds_to_wait() -> float:
    """Seconds that the ranks may take to meet: the value of FASTJEPA_RENDEZVOUS_SECONDS, 300 by default."""
    value = os.environ.get(WAIT_VARIABLE) or "300"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{WAIT_VARIABLE} = {value}: expected a number of seconds, more than 0 and less than 1e6")
    return seconds


def _place(launch: Launch) -> str:
    return f"{launch.master_addr}:{launch.master_port}"


def _open_store(launch: Launch, seconds: float) -> Store:
    # Rank 0 hosts the store, except under torchrun, whose agent does.
    hosts = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener = _listen(launch) if hosts else None
    try:
        _wait_for_connection(launch, min(seconds, 20.0) if hosts else seconds, hosts)
        store = TCPStore(
            launch.master_addr,
            launch.master_port,
            is_master=hosts,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
    finally:
        if listener:
            listener.close()
    # After a failure torchrun restarts all ranks with the same store: the prefix hides the cards of earlier attempts.
    return PrefixStore(f"fastjepa {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listen(launch: Launch) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", launch.master_port), family=family, backlog=2048, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(
            f"rank 0 on {socket.gethostname()} cannot listen on MASTER_PORT = {launch.master_port} "
            f"({os.strerror(error.errno or 0)}): another job, or another rank 0, uses it. Choose another port with "
            "--master_port (deepspeed, torchrun) or MASTER_PORT (srun)"
        ) from error


def _wait_for_connection(launch: Launch, seconds: float, hosts: bool) -> None:
    """Wait until MASTER_ADDR answers. TCPStore would wait too, but it prints a page of warnings and gives no reason."""
    end = time.monotonic() + seconds
    while True:
        try:
            timeout = max(1.0, min(10.0, end - time.monotonic()))
            socket.create_connection((launch.master_addr, launch.master_port), timeout).close()
            return
        except OSError as problem:
            reason = problem.strerror or str(problem)
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    here = socket.gethostname()
    if hosts:
        raise ConfigError(
            f"rank 0 runs on {here}, which MASTER_ADDR = {launch.master_addr} does not lead to ({reason}): "
            "expected rank 0's host"
        )
    raise ConfigError(
        f"rank {launch.rank} on {here} could not reach {_place(launch)} (MASTER_ADDR:MASTER_PORT) within {seconds:g} s "
        f"({reason}): is rank 0 running there, and is the port open to this host?"
    )


def _wait_until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _await_answer(store: Store, launch: Launch, seconds: float) -> Answer:
    # Rank 0 may have started later than this rank: wait longer than it does.
    if not _wait_until(lambda: store.check(["answer"]), 2 * seconds + 2 * GRACE_SECONDS):
        raise ConfigError(
            f"rank {launch.rank} on {socket.gethostname()} reached {_place(launch)}, but no rank 0 of this run came "
            f"there within {2 * seconds:g} s: was it started?"
        )
    return Answer(**json.loads(store.get("answer")))


def _answer_all(store: Store, launch: Launch, end: float) -> Answer:
    """Read the cards on rank 0 as they come, and write the answer."""
    cards: list[Card] = []
    while True:
        for ticket in range(len(cards) + 1, store.add("cards", 0) + 1):
            cards.append(Card.read(store.get(f"card {ticket}")))
        cards.sort(key=lambda card: card.rank)
        problem = contradiction(cards)
        if problem:
            end = min(end, time.monotonic() + GRACE_SECONDS)
        if len(cards) >= max(card.world_size for card in cards):
            break
        if time.monotonic() > end:
            problem = problem or _absence(cards, launch)
            break
        time.sleep(POLL_SECONDS)
    answer = Answer(problem, len(cards))
    store.set("answer", json.dumps(answer.__dict__))
    if not problem and len({card.gpu for card in cards}) > 1:
        logger.warning(
            "the GPUs differ, and the slowest sets the pace: %s", _ranks_by_value([(c, c.gpu) for c in cards])
        )
    return answer


def _absence(cards: list[Card], launch: Launch) -> str:
    """Say which ranks did not come."""
    there = {card.rank for card in cards}
    missing = [rank for rank in range(launch.world_size) if rank not in there]
    hosts = Counter(card.host for card in cards)
    return (
        f"{format_ranks(missing)} of {launch.world_size} did not come to {_place(launch)} in time ({WAIT_VARIABLE} sets "
        f"the seconds); {', '.join(f'{n} came from {host}' for host, n in hosts.items())}: see the logs of the missing ranks"
    )


def contradiction(cards: list[Card]) -> str | None:
    """Say in what the cards of one run contradict one another; None if they do not."""
    if len({card.world_size for card in cards}) > 1:
        sizes = _ranks_by_value([(card, str(card.world_size)) for card in cards])
        return f"the ranks were started with different WORLD_SIZE: {sizes}"
    claims = Counter(card.rank for card in cards)
    if twice := sorted(rank for rank, n in claims.items() if n > 1):
        hosts = ", ".join(card.host for card in cards if card.rank == twice[0])
        return (
            f"rank {twice[0]} was started more than once (on {hosts}): give every machine its own --node_rank, and every "
            "run its own port (--master_port)"
        )
    different = []
    for name in sorted({name for card in cards for name in card.facts}):
        values = [(card, card.facts.get(name, "not there")) for card in cards]
        if len({value for _, value in values}) > 1:
            different.append(f"{name}: {_ranks_by_value(values)}")
    if different:
        return f"the ranks are not alike: {'; '.join(different)}. Expected the same everywhere"
    for host, ranks in Counter(card.host for card in cards if card.gpu_id).items():
        gpus = len({card.gpu_id for card in cards if card.host == host})
        if gpus < ranks:
            return (
                f"there are {ranks} ranks but {gpus} {'GPU' if gpus == 1 else 'GPUs'} on {host}: expected one for each "
                "rank. --num_gpus (deepspeed), --nproc_per_node (torchrun) or --ntasks-per-node (srun) sets the ranks"
            )
    return None


def _ranks_by_value(values: list[tuple[Card, str]]) -> str:
    """List the ranks that have each value: "2.13.0 on ranks 0-7 (host-a), 2.12.0 on ranks 8-15 (host-b)"."""
    groups: dict[str, list[Card]] = defaultdict(list)
    for card, value in values:
        groups[value].append(card)
    return ", ".join(
        f"{value} on {format_ranks([c.rank for c in cards])} ({', '.join(sorted({c.host for c in cards}))})"
        for value, cards in groups.items()
    )


def format_ranks(ranks: list[int]) -> str:
    """Write ranks as spans: [0, 1, 2, 5] -> "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank <= spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
