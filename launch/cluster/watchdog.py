"""Ends every process soon after one of them is lost or stuck, with a message that says which, and where it stood.

A process that is killed leaves its peers in a collective. gloo and NCCL tell them late or never, and a host that drops
off the network is noticed after `--ddp_timeout`, half an hour. So every rank keeps one TCP connection to rank 0
(`launch.cluster.connections`):

    a process ends      its kernel closes the connection: rank 0 reads the end of it at once
    a host is gone      what was sent stays without a receipt: an error after `limit` seconds
    a rank raises       it says so before it ends
    a rank is stuck     torch's own time limit ends the others' collectives (`limit_groups`); beats name the rank

Rank 0 tells the others what it has found out, and each rank prints that and ends its process. If rank 0 is the one,
all others notice by themselves. Kernels give receipts, not programs: however long a save, a compilation or a step
takes, it is no sign of loss. Beats (every 2 s: the last completed phase, and where the main thread stands) end nothing
either: they say whom the others waited for when a collective has run out of time.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from ds_moelora.redaction import redact_text
from launch.checks import errors
from launch.checks.errors import EXIT_ERROR, UserError
from launch.cluster.connections import (
    Peer,
    accept_all,
    connect,
    listen,
    name_of,
    own_addresses,
    probe_when_idle,
)
from launch.cluster.processes import identity, kill, namespace

VERDICT_SECONDS = 1.5  # for the news of a lost rank to overtake the error that its loss has caused here
BEAT_SECONDS = 2.0
SILENT_SECONDS = 3 * BEAT_SECONDS
MAX_TEXT = 2000  # characters of a verdict
MAX_NAMED = 3  # ranks
TIMED_OUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)


class Watchdog:
    """One rank's end of the connections; `start` makes them.

    Args:
        rank: this one.
        peers: rank 0: all others; other ranks: rank 0; a run of one process: none.
        limit: seconds until a host that does not answer is given up.
    """

    def __init__(self, rank: int, peers: list[Peer], limit: float) -> None:
        self.rank, self.peers, self.limit = rank, peers, limit
        self._completed = "the start"
        self._lock = threading.Lock()
        self._ended = False
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            probe_when_idle(peer.connection, limit)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        if peers:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def reached(self, phase: str) -> None:
        """Notes that this rank has completed a phase of the run: others name it if they wait for this rank in vain."""
        self._completed = phase

    def announce(self, error: Exception) -> Exception:
        """Called on a rank that has failed, before it ends: its peers shall name the cause, not the consequence.

        Returns:
            What to show: of a collective that ran out of time, who was waited for.
        """
        end = []
        if not isinstance(error, UserError) and TIMED_OUT.search(str(error)):
            who = self._behind() or "it is not known which rank is behind"
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            error = UserError(
                f"{who}. Rank {self.rank} had completed {self._completed}, and waited until --ddp_timeout: {reason}"
            )
            end = [peer.process for peer in self.peers if _silence(peer)]
        elif not isinstance(error, UserError):
            # The loss of another rank breaks collectives, and their error ends up here, too. Then the thread ends this
            # process while it waits.
            time.sleep(VERDICT_SECONDS)
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        me = name_of(self.rank, identity())
        self._tell_all({"verdict": f"{me} failed: {redact_text(text)[:MAX_TEXT]}", "failed": True, "end": end})
        return error

    def stop(self) -> None:
        """Called when all ranks have come to the end: from here on they may go."""
        self._tell_all({"goodbye": True})

    def _tell_all(self, last_words: dict[str, Any]) -> bool:
        """Sends a last message, once; whether this was it."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            for peer in self.peers:
                peer.send(last_words)
        for process in last_words.get("end", []):
            kill(process)  # a stopped rank of this machine: nothing else may be there to do it
        return True

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
            message["behind"] = self._behind()
        with self._lock:
            for peer in self.peers:
                if not self._ended:
                    peer.send(message)

    def _read(self, peer: Peer) -> dict[str, Any] | None:
        """What a readable connection means: the loss or failure of a rank, or None."""
        try:
            messages = peer.receive()
        except OSError as error:
            self._selector.unregister(peer.connection)
            if peer.said_goodbye:
                return None
            how = "its connection closed"
            if not isinstance(error, ConnectionError):  # no answer, no route
                how = f"no sign of its host for {self.limit:g} s ({error.strerror or error})"
            return {"verdict": f"{peer} was lost: {how}."}
        for message in messages:
            if "verdict" in message:
                return message
            if "goodbye" in message:
                peer.said_goodbye = True
            else:
                peer.heard, peer.beat = time.monotonic(), message
        return None

    def _behind(self) -> str:
        """Whom the others wait for, by their beats: those that are silent, or else those in no collective."""
        silent = [
            f"{peer} has given no sign of life for {seconds:.0f} s: it is stopped or blocked; "
            f"it had completed {peer.beat.get('completed', 'the start')}"
            for peer in self.peers
            if (seconds := _silence(peer))
        ]
        told = [peer.beat["behind"] for peer in self.peers if peer.beat.get("behind")]  # by rank 0
        busy = [
            f"{peer} stands in {peer.beat['stands']}; it had completed {peer.beat['completed']}"
            for peer in self.peers
            if peer.beat and not peer.beat["waits"]
        ]
        found = silent or told + busy
        more = len(found) - MAX_NAMED
        return "; ".join(found[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")

    def _end_process(self, verdict: dict[str, Any]) -> None:
        """Passes the verdict on, prints it, and ends this process, whatever its main thread waits for."""
        if verdict.get("failed"):
            time.sleep(VERDICT_SECONDS / 2)  # it may have failed alike here, and is about to say so
        if self._tell_all(verdict):
            # Not print: the main thread may hold the lock of the stream.
            os.write(sys.stderr.fileno(), f"[rank {self.rank}] error: {verdict['verdict']}\n".encode())
            os._exit(EXIT_ERROR)


class Progress(TrainerCallback):
    """Tells the watchdog how far training has come."""

    def __init__(self, watch: Watchdog) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.reached("the preparation of training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.reached(f"step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.reached(f"the save after step {state.global_step}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        return Watchdog(0, [], limit)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    networks: list[Any] = [None] * world_size
    dist.all_gather_object(networks, (socket.gethostname(), identity()["boot"], namespace("net")))
    local = len({*networks}) == 1
    server = listen(world_size, local) if rank == 0 else None
    offer: list[Any] = [None]
    if server is not None:
        addresses = ["127.0.0.1"] if local else own_addresses()
        offer = [{**identity(), "addresses": addresses, "port": server.getsockname()[1], "key": secrets.token_hex(16)}]
    dist.broadcast_object_list(offer, 0)
    if server is not None:
        with server:
            peers = accept_all(server, offer[0]["key"], world_size - 1)
    else:
        peers = connect(offer[0], rank)
    connected: list[bool] = [False] * world_size
    dist.all_gather_object(connected, bool(peers))
    missing = [r for r, found in enumerate(connected) if not found]
    if missing and rank == 0:
        print(
            f"Ranks {missing} cannot reach port {offer[0]['port']} of {offer[0]['addresses']}: if one of them is lost, "
            "the others notice after --ddp_timeout only.",
            flush=True,
        )
    watchdog = Watchdog(rank, peers, limit)
    errors.before_end.append(watchdog.announce)
    return watchdog


def _silence(peer: Peer) -> float:
    """Seconds without a beat, if they are too many to be chance; else 0."""
    seconds = time.monotonic() - peer.heard
    return seconds if seconds > SILENT_SECONDS else 0.0


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
