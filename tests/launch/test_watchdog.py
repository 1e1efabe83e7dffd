"""What the watchdog makes of its connections; tests/launch/test_failures.py has whole runs that lose a rank."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from launch.cluster import watchdog
from launch.cluster.watchdog import Peer, Watchdog


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watchdog, Peer, socket.socket]]:
    """A watchdog that does not watch by itself, its peer, and that one's end of the connection."""
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        here, _ = server.accept()
        with here:
            peer = Peer(3, "somewhere", 42, here)
            yield Watchdog([peer], 30.0), peer, there


def test_the_end_of_a_connection_is_the_loss_of_a_rank(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    there.close()
    verdict = watch._read(peer)
    assert verdict == {"lost": "its connection closed", "rank": 3, "host": "somewhere", "pid": 42}


def test_after_a_goodbye_it_is_not(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    there.sendall(b'{"goodbye": true}\n')
    assert watch._read(peer) is None
    there.close()
    assert watch._read(peer) is None


def test_a_failure_is_passed_on_as_it_was_told(pair: tuple[Watchdog, Peer, socket.socket]) -> None:
    watch, peer, there = pair
    news = {"failed": "RuntimeError: no\nsuch luck", "rank": 5, "host": "h", "pid": 1}
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


def test_strangers_are_dropped() -> None:
    """Whoever does not know the run's key gets no answer and no place."""
    found: list[Peer] = []
    with watchdog._listen(4) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=lambda: found.extend(watchdog._accept_all(server, "key", 1)))
        thread.start()
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"key": "wrong", "rank": 1, "host": "h", "pid": 1}\n'):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(greeting)
                assert stranger.recv(1) == b""
        offer = {"key": "key", "addresses": ["192.0.2.1.invalid", "127.0.0.1"], "port": port, "host": "zero", "pid": 7}
        mine = watchdog._connect(offer, 2)
        thread.join(timeout=300)
    assert [(peer.rank, peer.host, peer.pid) for peer in mine] == [(0, "zero", 7)]
    assert [peer.rank for peer in found] == [2]
    for peer in [*mine, *found]:
        peer.connection.close()
