"""Ends every rank soon after one of them is lost, with a message that says which.

A rank that is killed leaves its peers in a collective. gloo and NCCL tell them late or never, DeepSpeed's collectives
in shared memory spin for ever, and a host that drops off the network is noticed after `--ddp_timeout`, half an hour.
So every rank keeps one idle TCP connection to rank 0:

    a process ends      its kernel closes the connection: rank 0 reads the end of it at once
    a host is gone      the kernel's keepalive probes go unanswered: an error after `limit` seconds
    a rank raises       it says so before it ends

Rank 0 tells the others what it has found out, and each rank prints that and ends its process. If rank 0 is the one,
all others notice by themselves. Kernels answer the probes, not programs: however long a save, a compilation or a step
takes, it is no sign of loss. A rank that hangs, but lives, is left to `--ddp_timeout`.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from launch.checks import errors
from launch.checks.errors import EXIT_ERROR, UserError

CONNECT_SECONDS = 20.0  # for all ranks to have connected, after all have been told where to
VERDICT_SECONDS = 1.5  # for the news of a lost rank to overtake the error that its loss has caused here
PROBES = 5  # keepalive probes that may stay without an answer
MAX_LINE = 1 << 16


@dataclass
class Peer:
    """A rank at the other end of a connection."""

    rank: int
    host: str
    pid: int
    connection: socket.socket
    unread: bytes = b""
    said_goodbye: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class Watchdog:
    """One rank's end of the connections; `start` makes them.

    Args:
        peers: rank 0: all others; other ranks: rank 0.
        limit: seconds until a host that does not answer is given up.
    """

    def __init__(self, peers: list[Peer], limit: float) -> None:
        self.peers = peers
        self.limit = limit
        self.rank = dist.get_rank()
        self._lock = threading.Lock()
        self._ended = False
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            _probe_when_idle(peer.connection, limit)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def announce(self, error: BaseException) -> None:
        """Called on a rank that has failed, before it ends: its peers shall name the cause, not the consequence."""
        if not isinstance(error, UserError):
            # The loss of another rank breaks collectives, and their error ends up here, too. Then the thread ends this
            # process while it waits.
            time.sleep(VERDICT_SECONDS)
        text = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
        self._end_watch({"failed": text, "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()})

    def stop(self) -> None:
        """Called when all ranks have come to the end: from here on they may go."""
        self._end_watch({"goodbye": True})

    def _end_watch(self, last_words: dict[str, Any]) -> None:
        with self._lock:
            self._ended = True
            _tell(self.peers, last_words)

    def _watch(self) -> None:
        """The thread: waits for a message, or for the end of a connection."""
        while not self._ended and self._selector.get_map():
            for key, _ in self._selector.select():
                verdict = self._read(key.data)
                if verdict is not None:
                    self._end_process(verdict)

    def _read(self, peer: Peer) -> dict[str, Any] | None:
        """What a readable connection means: the loss or failure of a rank, or None."""
        try:
            data = peer.connection.recv(MAX_LINE)
            how = "its connection closed" if not data else ""
        except ConnectionError:
            data, how = b"", "its connection closed"
        except OSError as error:  # no answer, no route
            data, how = b"", f"no sign of its host for {self.limit:g} s ({error.strerror or error})"
        if not data:
            self._selector.unregister(peer.connection)
            if peer.said_goodbye:
                return None
            return {"lost": how, "rank": peer.rank, "host": peer.host, "pid": peer.pid}
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "goodbye" in message:
                peer.said_goodbye = True
            else:
                return message
        return None

    def _end_process(self, verdict: dict[str, Any]) -> None:
        """Passes the verdict on, prints it, and ends this process, whatever its main thread waits for."""
        if "failed" in verdict:
            time.sleep(VERDICT_SECONDS / 2)  # it may have failed alike here, and is about to say so
        with self._lock:
            if self._ended:
                return  # this rank has failed itself, and is saying so
            self._ended = True
            _tell(self.peers, verdict)
        who = f"rank {verdict['rank']} ({verdict['host']}, pid {verdict['pid']})"
        what = f"failed: {verdict['failed']}" if "failed" in verdict else f"was lost: {verdict['lost']}."
        # Not print: the main thread may hold the lock of the stream.
        os.write(sys.stderr.fileno(), f"[rank {self.rank}] error: {who} {what}\n".encode())
        os._exit(EXIT_ERROR)


def start(limit: float) -> Watchdog | None:
    """Connects every rank with rank 0. A collective call, after `init_distributed`; None in a run of one process.

    Args:
        limit: seconds until a host that does not answer is given up.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    server = _listen(world_size) if rank == 0 else None
    offer: list[Any] = [None]
    if server is not None:
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        offer = [{**me, "addresses": _own_addresses(), "port": server.getsockname()[1], "key": secrets.token_hex(16)}]
    dist.broadcast_object_list(offer, 0)
    if server is not None:
        with server:
            peers = _accept_all(server, offer[0]["key"], world_size - 1)
    else:
        peers = _connect(offer[0], rank)
    connected: list[bool] = [False] * world_size
    dist.all_gather_object(connected, bool(peers))
    missing = [r for r, found in enumerate(connected) if not found]
    if missing and rank == 0:
        print(
            f"Ranks {missing} cannot reach port {offer[0]['port']} of {offer[0]['addresses']}: if one of them is lost, "
            "the others notice after --ddp_timeout only.",
            flush=True,
        )
    watchdog = Watchdog(peers, limit)
    errors.before_end.append(watchdog.announce)
    return watchdog


def _listen(backlog: int) -> socket.socket:
    """A server on a free port, for IPv4 and, where there is such, IPv6."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _own_addresses() -> list[str]:
    """Where other hosts may find this one: the rendezvous address, which they have used already, comes first."""
    names = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
    # No packet is sent: connecting a UDP socket makes the kernel choose the address that it would send from.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            names.append(probe.getsockname()[0])
        except OSError:
            names.append("127.0.0.1")  # no route to anywhere: all ranks are on this host
    return [name for name in dict.fromkeys(names) if name]


def _connect(offer: dict[str, Any], rank: int) -> list[Peer]:
    """This rank's connection to rank 0; empty if there is no way."""
    for address in offer["addresses"]:
        try:
            connection = socket.create_connection((address, offer["port"]), timeout=CONNECT_SECONDS / 4)
            greeting = {"key": offer["key"], "rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
            connection.sendall(json.dumps(greeting).encode() + b"\n")
            if connection.recv(1) == b"\n":  # it is rank 0, and not somebody else's port at the same address
                connection.settimeout(None)
                return [Peer(0, offer["host"], offer["pid"], connection)]
        except OSError:
            continue  # the next address may do
    return []


def _accept_all(server: socket.socket, key: str, count: int) -> list[Peer]:
    """The connections of the other ranks, as far as they come in time. Strangers, without the key, are dropped."""
    peers: list[Peer] = []
    deadline = time.monotonic() + CONNECT_SECONDS
    while len(peers) < count and time.monotonic() < deadline:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
        except OSError:
            continue  # nobody came
        try:
            peers.append(_greet(connection, key))
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()  # nobody of this run
    return peers


def _greet(connection: socket.socket, key: str) -> Peer:
    """Who has connected. Raises one of several errors unless it is a rank of this run."""
    connection.settimeout(CONNECT_SECONDS / 4)
    greeting = json.loads(_read_line(connection))
    if not secrets.compare_digest(str(greeting["key"]), key):
        raise ValueError("the key of another run")
    peer = Peer(int(greeting["rank"]), str(greeting["host"]), int(greeting["pid"]), connection)
    connection.sendall(b"\n")
    connection.settimeout(None)
    return peer


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE:
        data = connection.recv(MAX_LINE)
        if not data:
            raise ConnectionError("closed")
        line += data
    return line


def _tell(peers: list[Peer], message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    for peer in peers:
        try:
            peer.connection.sendall(line)
        except OSError:
            continue  # it is gone: that is what the others are being told


def _probe_when_idle(connection: socket.socket, limit: float) -> None:
    """Keepalive such that an idle connection to a host that is gone breaks after `limit` seconds."""
    every = max(1, round(limit / (PROBES + 1)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": every, "TCP_KEEPINTVL": every, "TCP_KEEPCNT": PROBES}
    # Keepalive does not run while something that was sent waits for its receipt; this does.
    options["TCP_USER_TIMEOUT"] = round(1000 * limit)
    for name, value in options.items():
        if hasattr(socket, name):  # all on Linux, some elsewhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
