"""What the watchdog makes of its connections; tests/launch/test_failures.py has whole runs that lose a rank."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cluster import connections, processes
from launch.cluster.connections import Peer
from launch.cluster.watchdog import Watchdog


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watchdog, Peer, socket.socket]]:
    """A watchdog that does not watch by itself, its peer, and that one's end of the connection."""
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        here, _ = server.accept()
        with here:
            peer = Peer(3, {"host": "somewhere", "pid": 42}, here)
            yield Watchdog(0, [peer], 30.0), peer, there


def test_the_end_of_a_connection_is_the_loss_of_a_rank(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    there.close()
    assert watch._read(peer) == {"verdict": "rank 3 (somewhere, pid 42) was lost: its connection closed."}


def test_after_a_goodbye_it_is_not(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    there.sendall(b'{"goodbye": true}\n')
    assert watch._read(peer) is None
    there.close()
    assert watch._read(peer) is None


def test_a_failure_is_passed_on_as_it_was_told(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    news = {"verdict": "rank 5 (h, pid 1) failed: RuntimeError: no\nsuch luck", "failed": True}
    line = json.dumps(news).encode() + b"\n"
    there.sendall(line[:10])
    assert watch._read(peer) is None
    there.sendall(line[10:])
    assert watch._read(peer) == news


def test_the_kernel_probes_an_idle_connection(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    connection = pair[1].connection
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT]
    idle, interval, count, timeout = (connection.getsockopt(socket.IPPROTO_TCP, option) for option in options)
    assert idle + interval * count == 30
    assert timeout == 30_000


def test_nobody_waits_for_a_peer_that_does_not_read(
    pair: tuple[Watchdog, Peer, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = pair[1]
    peer.connection.settimeout(0.01)
    peer.send({"verdict": "x" * (1 << 24)})  # more than both kernels hold
    assert peer.deaf
    monkeypatch.setattr(peer, "connection", None)
    peer.send({"goodbye": True})  # nothing more is sent, or waited for


def test_a_beat_names_who_is_behind(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    there.sendall(b'{"completed": "step 12", "stands": "queue.py:171 get", "waits": false}\n')
    assert watch._read(peer) is None
    assert watch._behind() == "rank 3 (somewhere, pid 42) stands in queue.py:171 get; it had completed step 12"
    there.sendall(b'{"completed": "step 12", "stands": "c10d.py:1 all_reduce", "waits": true}\n')
    assert watch._read(peer) is None
    assert watch._behind() == ""
    peer.heard -= 21
    assert re.search(r"rank 3 .* no sign of life for 21 s: .*; it had completed step 12", watch._behind())


def test_an_error_of_time_becomes_the_name_of_a_rank(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    peer.beat = {"completed": "step 3", "stands": "threading.py:1 wait", "waits": False}
    watch.reached("step 3")
    shown = watch.announce(RuntimeError("[unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation"))
    assert re.match(r"rank 3 .* stands in threading.py:1 wait.*Rank 0 had completed step 3.*20000ms", str(shown))
    told = json.loads(there.recv(4096))
    assert told["verdict"].startswith("rank 0 (")
    assert told["verdict"].endswith(f"failed: {shown}")


def test_a_stopped_rank_of_this_machine_is_ended() -> None:
    """By number, birth and process namespace: no other process that has its number."""
    with subprocess.Popen(["sleep", "60"]) as process:
        os.kill(process.pid, signal.SIGSTOP)
        it = {**processes.identity(), "pid": process.pid, "started": processes.start_time(process.pid)}
        for other in ({"started": "1"}, {"pids": "elsewhere"}, {"boot": "another"}, {"started": None}):
            processes.kill({**it, **other})
        assert process.poll() is None
        processes.kill(it)
        assert process.wait(timeout=300) == -signal.SIGKILL
    processes.kill(it)  # gone


@dataclass
class Stranger:
    """Somebody at the port without the run's key.

    Args:
        sends: pieces; pause: seconds between them. closes: whether it leaves then, or stays.
    """

    sends: list[bytes]
    pause: float
    closes: bool

    def act(self, port: int, over: threading.Event) -> None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            for piece in self.sends:
                connection.sendall(piece)
                if over.wait(self.pause):
                    return
            if not self.closes:
                over.wait()


PIECES = st.one_of(
    st.binary(max_size=64),
    st.binary(min_size=1000, max_size=3000),
    st.sampled_from([b"GET / HTTP/1.1\r\n\r\n", b"[" * 60000 + b"\n", b"\0" * 48 + b"{}\n", b"\n" * 2000,
                     b'{"key": "x", "rank": 1, "host": "h", "pid": 1}\n', b"\x80\xff" * 100]),
)  # fmt: skip
STRANGERS = st.builds(Stranger, st.lists(PIECES, max_size=3), st.sampled_from([0.0, 0.001, 0.05]), st.booleans())


@settings(deadline=None)
@given(strangers=st.lists(STRANGERS, max_size=8), crowd=st.sampled_from([0, 0, 0, connections.MAX_PENDING + 20]))
def test_strangers(strangers: list[Stranger], crowd: int) -> None:
    """They come before the real rank, and during: none gets a place, or raises in rank 0, or keeps it waiting."""
    found: list[Peer] = []
    over = threading.Event()
    with connections.listen(600, local=True) as server:
        port = server.getsockname()[1]
        others = [threading.Thread(target=s.act, args=(port, over), daemon=True) for s in strangers]
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(crowd)]
        accepting = threading.Thread(target=lambda: found.extend(connections.accept_all(server, "key", 1)), daemon=True)
        for thread in (*others, accepting):
            thread.start()
        offer = {"key": "key", "addresses": ["127.0.0.1"], "port": port, "host": "zero", "pid": 7}
        try:
            mine = connections.connect(offer, 2)
            accepting.join(timeout=connections.CONNECT_SECONDS + 20)
        finally:
            over.set()
    assert [str(peer) for peer in mine] == ["rank 0 (zero, pid 7)"]
    assert [peer.rank for peer in found] == [2]
    for connection in (*idle, *(peer.connection for peer in (*mine, *found))):
        connection.close()
    for thread in others:
        thread.join(timeout=300)


def test_a_wrong_key_gets_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a rank of another run; nor a greeting that was overheard and sent once more."""
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 2.0)
    found: list[Peer] = []
    with connections.listen(4, local=True) as server:
        port = server.getsockname()[1]
        assert server.getsockname()[0] == "127.0.0.1"
        thread = threading.Thread(target=lambda: found.extend(connections.accept_all(server, "key", 2)))
        thread.start()
        text = json.dumps({**processes.identity(), "rank": 1}).encode().ljust(connections.TEXT)
        nonce = b"n" * connections.NONCE
        wrong = nonce + connections._proof("another key", b"rank", nonce + text) + text
        right = nonce + connections._proof("key", b"rank", nonce + text) + text
        answers = []
        for greeting in (wrong, right, right):
            with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
                connection.sendall(greeting)
                answers.append(len(connection.recv(100)))
        thread.join(timeout=300)
    assert answers == [0, connections.PROOF, 0]
    assert [peer.rank for peer in found] == [1]
    found[0].connection.close()
