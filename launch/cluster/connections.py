"""The watchdog's connections: one from every rank to rank 0, each side proved to be of this run.

    rank -> rank 0      nonce, HMAC-SHA256(key, nonce + who it is), who it is: 560 bytes
    rank 0 -> rank      HMAC-SHA256(key, nonce)

The key is made for each run and travels through torch.distributed. Rank 0 listens until all ranks have come, on the
loopback interface if all are on one host. Nothing is parsed or answered before the proof. A connection may send these
560 bytes within 5 s, and none delays another.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launch.cluster.processes import identity

CONNECT_SECONDS = 20.0  # for all ranks to have connected, after all have been told where to
GREETING_SECONDS = 5.0  # for one connection to prove that it is a rank's
SEND_SECONDS = 1.0
MAX_PENDING = 256  # connections that have proved nothing yet; the oldest makes room
PROBES = 5  # keepalive probes that may stay without an answer
NONCE, PROOF, TEXT = 16, 32, 512  # bytes


@dataclass
class Peer:
    """A rank at the other end of a connection.

    Args:
        process: its `identity`.
        beat: its last sign of life: `completed` phase, place in the code it `stands` in, whether it `waits` there for
            others. heard: when that came.
        said_goodbye: it has told that it ends. deaf: it does not read (stopped), or is gone.
    """

    rank: int
    process: dict[str, Any]
    connection: socket.socket
    beat: dict[str, Any] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    said_goodbye: bool = False
    deaf: bool = False
    unread: bytes = b""

    def __post_init__(self) -> None:
        self.connection.settimeout(SEND_SECONDS)

    def __str__(self) -> str:
        return name_of(self.rank, self.process)

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message, but gives up on a peer that does not read; that it is gone, `receive` finds."""
        if not self.deaf:
            try:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self.deaf = True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come in full.

        Raises:
            ConnectionError: the process has ended.
            OSError: its host does not answer.
        """
        data = self.connection.recv(1 << 16)
        if not data:
            raise ConnectionResetError("closed")
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


def name_of(rank: int, process: dict[str, Any]) -> str:
    """How messages name a rank, by its process's `identity`."""
    return f"rank {rank} ({process['host']}, pid {process['pid']})"


def listen(backlog: int, local: bool) -> socket.socket:
    """A server on a free port: of the loopback interface, or for IPv4 and, where there is such, IPv6."""
    if local:
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def own_addresses() -> list[str]:
    """Where other hosts may find this one: the rendezvous address, which they have used already, comes first."""
    names = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
    # No packet is sent: connecting a UDP socket makes the kernel choose the address that it would send from.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        names.append(probe.getsockname()[0])
    return [name for name in dict.fromkeys(names) if name]


def connect(offer: dict[str, Any], rank: int) -> list[Peer]:
    """This rank's connection to rank 0; empty if there is no way within CONNECT_SECONDS.

    Args:
        offer: rank 0's identity, its `addresses` and `port`, and the run's `key`.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:
        for address in offer["addresses"]:
            with suppress(OSError):  # the next address may do
                connection = socket.create_connection((address, offer["port"]), timeout=GREETING_SECONDS)
                if _introduce(connection, offer["key"], rank):
                    return [Peer(0, {name: value for name, value in offer.items() if name != "key"}, connection)]
                connection.close()  # somebody else's port at the same address
        time.sleep(0.2)
    return []


def _introduce(connection: socket.socket, key: str, rank: int) -> bool:
    """Proves to rank 0 that this is a rank of the run; whether it has proved the same."""
    nonce, text = secrets.token_bytes(NONCE), json.dumps({**identity(), "rank": rank}).encode().ljust(TEXT)
    connection.sendall(nonce + _proof(key, b"rank", nonce + text) + text)
    answer = connection.recv(PROOF, socket.MSG_WAITALL)
    return hmac.compare_digest(answer, _proof(key, b"rank 0", nonce))


def accept_all(server: socket.socket, key: str, count: int) -> list[Peer]:
    """The connections of `count` ranks, as far as they come within CONNECT_SECONDS. Strangers are dropped."""
    server.setblocking(False)
    return asyncio.run(_accept(server, key, count))


async def _accept(server: socket.socket, key: str, count: int) -> list[Peer]:
    peers: dict[int, Peer] = {}
    nonces: set[bytes] = set()
    pending: dict[asyncio.Task[None], None] = {}  # in the order they came

    async def greet(connection: socket.socket) -> None:
        try:
            peer = await asyncio.wait_for(_recognize(connection, key, nonces), GREETING_SECONDS)
        except (Exception, asyncio.CancelledError):  # whatever a stranger sends, or does to the connection
            connection.close()
        else:
            peers[peer.rank] = peer

    async def open_door() -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(server)
            except OSError:  # gone again, or too many
                await asyncio.sleep(0.1)
                continue
            if len(pending) >= MAX_PENDING:
                next(iter(pending)).cancel()
            task = asyncio.create_task(greet(connection))
            pending[task] = None
            task.add_done_callback(pending.pop)
            await asyncio.sleep(0)  # a crowd at the door must not keep those inside waiting

    door = asyncio.create_task(open_door())
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(peers) < count and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    for task in (door, *pending):
        task.cancel()
    await asyncio.gather(door, *pending, return_exceptions=True)
    return list(peers.values())


async def _recognize(connection: socket.socket, key: str, nonces: set[bytes]) -> Peer:
    """The rank at the other end, once it has proved that it is one.

    Args:
        nonces: those of earlier greetings, none of which may come again.

    Raises:
        ValueError: nobody of this run.
    """
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    greeting = b""
    while len(greeting) < NONCE + PROOF + TEXT:
        data = await loop.sock_recv(connection, NONCE + PROOF + TEXT - len(greeting))
        if not data:
            raise ValueError("no greeting")
        greeting += data
    nonce, proof, text = greeting[:NONCE], greeting[NONCE : NONCE + PROOF], greeting[NONCE + PROOF :]
    if not hmac.compare_digest(proof, _proof(key, b"rank", nonce + text)) or nonce in nonces:
        raise ValueError("another key, or an old greeting")
    nonces.add(nonce)
    connection.send(_proof(key, b"rank 0", nonce))
    told = json.loads(text)
    return Peer(told.pop("rank"), told, connection)


def _proof(key: str, role: bytes, what: bytes) -> bytes:
    """That its maker has the key, in this role, in this exchange."""
    return hmac.digest(key.encode(), role + b"\0" + what, "sha256")


def probe_when_idle(connection: socket.socket, limit: float) -> None:
    """Makes a connection to a host that is gone break after `limit` seconds, whether or not something was sent."""
    every = max(1, round(limit / (PROBES + 1)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": every, "TCP_KEEPINTVL": every, "TCP_KEEPCNT": PROBES}
    options["TCP_USER_TIMEOUT"] = round(1000 * limit)
    for name, value in options.items():
        if hasattr(socket, name):  # all on Linux, some elsewhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
