"""Ends every process soon after one of them is lost or stuck, with a message that says which, and where it stood.

A process that is killed leaves its peers in a collective. gloo and NCCL tell them late or never, and a host that drops
off the network is noticed after `--ddp_timeout`, half an hour. So every rank keeps one TCP connection to rank 0:

    a process ends      its kernel closes the connection: rank 0 reads the end of it at once
    a host is gone      what was sent stays without a receipt: an error after `limit` seconds
    a rank raises       it says so before it ends
    a rank is stuck     torch's own time limit ends the others' collectives (`limit_groups`); beats name the rank

Rank 0 tells the others what it has found out, and each rank prints that and ends its process. If rank 0 is the one,
all others notice by themselves. Kernels give receipts, not programs: however long a save, a compilation or a step
takes, it is no sign of loss. Beats (every 2 s: the last completed phase, and where the main thread stands) end nothing
either: they say whom the others waited for when a collective has run out of time.

Strangers: rank 0 listens until all ranks have come, on the loopback interface if all are on one host. Both sides prove
that they have the run's key (HMAC-SHA256 over a random number) before anything is read or answered; a connection may
send 1 kB within 5 s, and none delays another.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_moelora.redaction import redact_text
from launch.checks import errors
from launch.checks.errors import EXIT_ERROR, UserError

CONNECT_SECONDS = 20.0  # for all ranks to have connected, after all have been told where to
GREETING_SECONDS = 5.0  # for one connection to prove that it is a rank's
MAX_PENDING = 256  # connections that have proved nothing yet; the oldest makes room
VERDICT_SECONDS = 1.5  # for the news of a lost rank to overtake the error that its loss has caused here
BEAT_SECONDS = 2.0
SILENT_SECONDS = 3 * BEAT_SECONDS
PROBES = 5  # keepalive probes that may stay without an answer
MAX_BYTES = 1024  # of a message, and of all that a connection may send before it is known
NONCE, PROOF = 16, 32  # bytes
TIMED_OUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)


@dataclass
class Peer:
    """A rank at the other end of a connection.

    Args:
        home: machine and process namespace, in which `pid` means something; born: when that process started.
        completed, stands, waits: its last beat: last completed phase, place in the code, whether in a collective.
        heard: when that was.
    """

    rank: int
    host: str
    pid: int
    connection: socket.socket
    home: str = ""
    born: int = 0
    unread: bytes = b""
    unsent: bytes = b""
    said_goodbye: bool = False
    completed: str = "the start"
    stands: str = ""
    waits: bool = False
    heard: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def silence(self) -> float:
        """Seconds without a beat, if they are too many to be chance; else 0."""
        seconds = time.monotonic() - self.heard
        return seconds if seconds > SILENT_SECONDS else 0.0

    def send(self, message: dict[str, Any] | None, seconds: float) -> None:
        """Sends a message, and what an earlier call has left; gives up after `seconds`, since nobody may be reading."""
        if message is not None:
            self.unsent += _line(message)
        deadline = time.monotonic() + seconds
        while self.unsent:
            try:
                self.unsent = self.unsent[self.connection.send(self.unsent) :]
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
            except OSError:
                return  # it is gone, which reading the connection will show


class StuckError(UserError):
    """A collective has run out of time."""


class Watchdog:
    """One rank's end of the connections; `start` makes them.

    Args:
        peers: rank 0: all others; other ranks: rank 0; a run of one process: none.
        limit: seconds until a host that does not answer is given up.
    """

    def __init__(self, peers: list[Peer], limit: float) -> None:
        self.peers = peers
        self.limit = limit
        self.rank = dist.get_rank() if dist.is_initialized() or peers else 0
        self._completed = "the start"
        self._told_stuck = ""  # by rank 0: who is behind
        self._lock = threading.Lock()
        self._ended = False
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            peer.connection.setblocking(False)
            _probe_when_idle(peer.connection, limit)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        if peers:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def reached(self, phase: str) -> None:
        """Notes that this rank has completed a phase of the run: others name it if they wait for this rank in vain."""
        self._completed = phase

    def announce(self, error: Exception) -> Exception | None:
        """Called on a rank that has failed, before it ends: its peers shall name the cause, not the consequence.

        Returns:
            What to show instead: of a collective that ran out of time, who was waited for.
        """
        stuck = not isinstance(error, UserError) and TIMED_OUT.search(str(error)) is not None
        if stuck:
            who = self._stuck() or "it is not known which rank is behind"
            error = StuckError(
                f"{who}. Rank {self.rank} had completed {self._completed}, and waited until --ddp_timeout: "
                f"{_first_line(error)}"
            )
        elif not isinstance(error, UserError):
            # The loss of another rank breaks collectives, and their error ends up here, too. Then the thread ends this
            # process while it waits.
            time.sleep(VERDICT_SECONDS)
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        verdict = {"failed": redact_text(text), "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._end_watch({**verdict, "end": self._silent()} if stuck else verdict)
        return error

    def stop(self) -> None:
        """Called when all ranks have come to the end: from here on they may go."""
        self._end_watch({"goodbye": True})

    def _end_watch(self, last_words: dict[str, Any]) -> None:
        with self._lock:
            self._ended = True
            for peer in self.peers:
                peer.send(last_words, seconds=1.0)
        _kill(last_words.get("end", []))

    def _watch(self) -> None:
        """The thread: sends beats, and waits for a message or the end of a connection."""
        beat = 0.0
        while not self._ended and self._selector.get_map():
            for key, _ in self._selector.select(BEAT_SECONDS / 2):
                verdict = self._read(key.data)
                if verdict is not None:
                    self._end_process(verdict)
            if time.monotonic() - beat > BEAT_SECONDS:
                beat = time.monotonic()
                self._beat()

    def _beat(self) -> None:
        stands, waits = _main_thread()
        message = {"completed": self._completed, "stands": stands, "waits": waits}
        if self.rank == 0:
            message["stuck"] = self._stuck()
        with self._lock:
            for peer in self.peers:
                if not self._ended:
                    peer.send(None if peer.unsent else message, seconds=0.0)

    def _read(self, peer: Peer) -> dict[str, Any] | None:
        """What a readable connection means: the loss or failure of a rank, or None."""
        try:
            data = peer.connection.recv(MAX_BYTES)
            how = "its connection closed" if not data else ""
        except BlockingIOError:
            return None
        except ConnectionError:
            data, how = b"", "its connection closed"
        except OSError as error:  # no answer, no route
            data, how = b"", f"no sign of its host for {self.limit:g} s ({error.strerror or error})"
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        if len(peer.unread) > MAX_BYTES:
            how = f"it sent more than {MAX_BYTES} bytes without an end"
        if how:
            self._selector.unregister(peer.connection)
            if peer.said_goodbye:
                return None
            return {"lost": how, "rank": peer.rank, "host": peer.host, "pid": peer.pid}
        for message in filter(None, map(_parsed, lines)):
            if "goodbye" in message:
                peer.said_goodbye = True
            elif "completed" in message:
                peer.heard, peer.completed = time.monotonic(), str(message["completed"])
                peer.stands, peer.waits = str(message.get("stands", "")), bool(message.get("waits"))
                self._told_stuck = str(message.get("stuck", ""))
            elif {"rank", "host", "pid"} <= message.keys() and ("failed" in message or "lost" in message):
                return message
        return None

    def _stuck(self) -> str:
        """Whom the others wait for, by their beats: those that are silent, or else those in no collective."""
        silent = [
            f"{peer} has given no sign of life for {peer.silence():.0f} s: it is stopped or blocked; "
            f"it had completed {peer.completed}"
            for peer in self.peers
            if peer.silence()
        ]
        busy = [
            f"{peer} stands in {peer.stands}; it had completed {peer.completed}"
            for peer in self.peers
            if not peer.waits and peer.stands
        ]
        found = silent or [text for text in (self._told_stuck, *busy) if text]
        return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")

    def _silent(self) -> list[list[Any]]:
        """Process, birth and home of the ranks that cannot end by themselves; the first few."""
        return [[peer.pid, peer.born, peer.home] for peer in self.peers if peer.silence()][:4]

    def _end_process(self, verdict: dict[str, Any]) -> None:
        """Passes the verdict on, prints it, and ends this process, whatever its main thread waits for."""
        if "failed" in verdict:
            time.sleep(VERDICT_SECONDS / 2)  # it may have failed alike here, and is about to say so
        with self._lock:
            if self._ended:
                return  # this rank has failed itself, and is saying so
            self._ended = True
            for peer in self.peers:
                peer.send(verdict, seconds=1.0)
        _kill(verdict.get("end", []))
        who = f"rank {verdict['rank']} ({verdict['host']}, pid {verdict['pid']})"
        what = f"failed: {verdict['failed']}" if "failed" in verdict else f"was lost: {verdict['lost']}."
        # Not print: the main thread may hold the lock of the stream.
        os.write(sys.stderr.fileno(), f"[rank {self.rank}] error: {who} {what}\n".encode())
        os._exit(EXIT_ERROR)


class Progress(TrainerCallback):
    """Tells the watchdog how far training has come."""

    def __init__(self, watch: Watchdog) -> None:
        self.watch = watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.reached("the preparation of training")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.watch.reached(f"step {state.global_step}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.watch.reached(f"the save after step {state.global_step}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.watch.reached(f"the evaluation after step {state.global_step}")


def limit_groups(timeout: timedelta) -> None:
    """Makes `timeout` the limit of every process group that is made from here on.

    DeepSpeed makes its groups without naming a limit, and torch then takes its own (30 minutes; NCCL: 10), whatever the
    first group has: `--ddp_timeout` would not reach the collectives of training.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if not hasattr(dist.distributed_c10d, name):
            raise RuntimeError(f"torch.distributed.distributed_c10d has no {name}; torch 2.4 to 2.13 have.")
        setattr(dist.distributed_c10d, name, timeout)


def start(limit: float) -> Watchdog:
    """Connects every rank with rank 0. A collective call, after `init_distributed`.

    Args:
        limit: seconds until a host that does not answer is given up.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Watchdog([], limit)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    networks: list[Any] = [None] * world_size
    dist.all_gather_object(networks, _namespace("net"))
    local = len({*networks}) == 1
    server = _listen(world_size, local) if rank == 0 else None
    offer: list[Any] = [None]
    if server is not None:
        addresses = ["127.0.0.1"] if local else _own_addresses()
        offer = [{**_me(), "addresses": addresses, "port": server.getsockname()[1], "key": secrets.token_hex(16)}]
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


# -- connections -------------------------------------------------------------------------------------------------------


@dataclass
class _Caller:
    """A connection to rank 0 that has proved nothing yet."""

    connection: socket.socket
    deadline: float
    received: bytes = b""

    def advance(self, key: str, nonces: set[bytes]) -> Peer | None:
        """Reads what there is; the rank, once it has proved that it is one.

        Args:
            key: the run's.
            nonces: those of earlier greetings, none of which may come again.

        Raises:
            ValueError: nobody of this run.
        """
        data = self.connection.recv(MAX_BYTES - len(self.received))
        self.received += data
        head, text = self.received[: NONCE + PROOF], self.received[NONCE + PROOF :]
        if not text.endswith(b"\n"):
            if not data or len(self.received) >= MAX_BYTES:
                raise ValueError("no greeting")
            return None
        nonce, proof = head[:NONCE], head[NONCE:]
        if not hmac.compare_digest(proof, _proof(key, b"rank", nonce, text)) or nonce in nonces:
            raise ValueError("another key, or an old greeting")
        nonces.add(nonce)
        told = json.loads(text)
        self.connection.send(_proof(key, b"rank 0", nonce))
        return Peer(told["rank"], told["host"], told["pid"], self.connection, told["home"], told["born"])


def _listen(backlog: int, local: bool = False) -> socket.socket:
    """A server on a free port: of the loopback interface, or for IPv4 and, where there is such, IPv6."""
    if local:
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
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
    """This rank's connection to rank 0; empty if there is no way within CONNECT_SECONDS."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:
        for address in offer["addresses"]:
            try:
                connection = socket.create_connection((address, offer["port"]), timeout=GREETING_SECONDS)
                if _introduce(connection, offer["key"], rank):
                    zero = offer.get("home", ""), offer.get("born", 0)
                    return [Peer(0, offer["host"], offer["pid"], connection, *zero)]
                connection.close()  # somebody else's port at the same address
            except OSError:
                continue  # the next address may do
        time.sleep(0.2)
    return []


def _introduce(connection: socket.socket, key: str, rank: int) -> bool:
    """Proves to rank 0 that this is a rank of the run; whether it has proved the same."""
    nonce, text = secrets.token_bytes(NONCE), _line({**_me(), "rank": rank})
    connection.sendall(nonce + _proof(key, b"rank", nonce, text) + text)
    return hmac.compare_digest(_receive(connection, PROOF), _proof(key, b"rank 0", nonce))


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("closed")
        data += more
    return data


def _accept_all(server: socket.socket, key: str, count: int) -> list[Peer]:
    """The connections of the other ranks, as far as they come in time. Strangers, without the key, are dropped."""
    peers: dict[int, Peer] = {}
    callers: dict[socket.socket, _Caller] = {}
    nonces: set[bytes] = set()
    deadline = time.monotonic() + CONNECT_SECONDS
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)

        def drop(caller: _Caller, close: bool = True) -> None:
            selector.unregister(caller.connection)
            del callers[caller.connection]
            if close:
                caller.connection.close()

        while len(peers) < count and time.monotonic() < deadline:
            for ready, _ in selector.select(0.2):
                caller = callers.get(ready.fileobj)  # type: ignore[call-overload]
                try:
                    if ready.fileobj is server:
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        caller = _Caller(connection, time.monotonic() + GREETING_SECONDS)
                        callers[connection] = caller
                        selector.register(caller.connection, selectors.EVENT_READ)
                    elif caller is not None and (peer := caller.advance(key, nonces)) is not None:
                        drop(caller, close=False)
                        peers[peer.rank] = peer
                except Exception:  # whatever a stranger sends, or does to the connection
                    if caller is not None and caller.connection in callers:
                        drop(caller)
            late = [c for c in callers.values() if c.deadline < time.monotonic()]
            for caller in late or list(callers.values())[: max(len(callers) - MAX_PENDING, 0)]:
                drop(caller)
        for caller in list(callers.values()):
            drop(caller)
    return list(peers.values())


def _proof(key: str, role: bytes, *parts: bytes) -> bytes:
    """That its maker has the key, in this role, in this exchange."""
    return hmac.digest(key.encode(), b"\0".join((role, *parts)), "sha256")


def _probe_when_idle(connection: socket.socket, limit: float) -> None:
    """Makes a connection to a host that is gone break after `limit` seconds, whether or not something was sent."""
    every = max(1, round(limit / (PROBES + 1)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": every, "TCP_KEEPINTVL": every, "TCP_KEEPCNT": PROBES}
    options["TCP_USER_TIMEOUT"] = round(1000 * limit)
    for name, value in options.items():
        if hasattr(socket, name):  # all on Linux, some elsewhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# -- messages, processes -----------------------------------------------------------------------------------------------


def _line(message: dict[str, Any]) -> bytes:
    """A message as one line of at most MAX_BYTES; the longest text in it is cut."""
    while True:
        line = json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\n"
        excess = len(line) - MAX_BYTES
        longest = max((k for k, v in message.items() if isinstance(v, str)), key=lambda k: len(message[k]), default="")
        if excess <= 0 or not message.get(longest):
            return line
        message = {**message, longest: message[longest][: max(len(message[longest]) - excess, 0)]}


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "home": _namespace("pid"), "born": _born(os.getpid())}


def _namespace(kind: str) -> str:
    """This machine, and the namespace that processes (or addresses) here belong to; the host's name without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(f'/proc/self/ns/{kind}')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> int:
    """When a process started, in the kernel's ticks, so that another one with its number is told apart; 0: unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _kill(processes: list[Any]) -> None:
    """Ends stopped ranks of this machine: nothing else may be there to do it."""
    for pid, born, home in processes:
        if born and home == _namespace("pid") and born == _born(pid):
            with suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile, or is not ours
                os.kill(pid, signal.SIGKILL)


def _main_thread() -> tuple[str, bool]:
    """Where the main thread stands, innermost first, and whether it is in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    places, waits = [], False
    while frame is not None and len(places) < 8:
        module = str(frame.f_globals.get("__name__", ""))
        waits = waits or module.startswith(("torch.distributed", "deepspeed.comm"))
        places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(places[:3]), waits


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
