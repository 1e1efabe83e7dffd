"""What `launch/cluster/multinode.py` runs on the hosts. Standard library alone; `probe` also runs where this file is
not yet.

    python remote.py exec PAYLOAD     changes folder and environment, becomes the command (pdsh, Open MPI: one rank)
    python remote.py serve PAYLOAD    starts the command and stays with it (ssh, torchrun: one node's launcher)
    python -c ... SOURCE PAYLOAD      `probe`: prints what there is on this host

PAYLOAD is JSON in base64, so that no shell on the way (pdsh's, sshd's) finds anything to interpret in it.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from importlib import metadata
from typing import Any

MARK = "DS_MOELORA_PROBE "
PACKAGES = ("torch", "deepspeed", "transformers", "peft")
# `serve` hears a line at least every BEAT_SECONDS; a host cut off from the network for longer than SILENCE_SECONDS ends
# its ranks by itself. GRACE_SECONDS is what a node's launcher has to end its ranks (both wait 30 s before they kill).
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 30.0
GRACE_SECONDS = 45.0


def encode(payload: dict[str, Any]) -> str:
    """A payload as one word of letters, digits, `-`, `_` and `=`."""
    return base64.urlsafe_b64encode(json.dumps(payload).encode()).decode()


def decode(word: str) -> dict[str, Any]:
    """The payload that `encode` made a word of."""
    return json.loads(base64.urlsafe_b64decode(word))


def enter(payload: dict[str, Any]) -> None:
    """Takes over the payload's environment and working directory. This Python's programs (ninja) are on PATH."""
    os.environ.update(payload["env"])
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath)
    os.chdir(payload["cwd"])


def serve(payload: dict[str, Any]) -> int:
    """Runs the command; returns its exit code. Lines on stdin are numbers of signals for it, and its end ends it."""
    enter(payload)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, and all below it, would ignore Ctrl-C
    child = subprocess.Popen(payload["command"], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_obey, args=(child,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _obey(child: subprocess.Popen[bytes]) -> None:
    """Hands signals on until stdin ends or falls silent; then ends the child."""
    while select.select([0], [], [], SILENCE_SECONDS)[0]:
        numbers = os.read(0, 4096).split()
        if not numbers:
            break
        for number in filter(None, map(int, numbers)):  # 0: a sign of life
            child.send_signal(number)
    child.terminate()
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)


def facts(payload: dict[str, Any]) -> dict[str, Any]:
    """What there is on this host: versions, paths, names, interfaces and devices.

    Args:
        payload: `root` (the repository), `paths` (that must exist), `python_path` (searched for packages first),
            `connect` ([address, port], or None: whether a connection can be made).
    """
    sys.path[:0] = payload["python_path"]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = None
    return {
        "versions": {**versions, "ds_moelora": source_version(payload["root"])},
        "missing": [path for path in payload["paths"] if not os.path.exists(path)],
        "hostname": name,
        "address": address,
        "interfaces": [interface for _, interface in socket.if_nameindex()],
        "devices": len(glob.glob("/dev/nvidia[0-9]*")),
        "connect_error": _connect(*payload["connect"]) if payload["connect"] else None,
    }


def source_version(root: str) -> str:
    """Version of the package in a copy of the repository, and a digest of all that runs."""
    files = [os.path.join(root, part, "**", "*.py") for part in ("ds_moelora", "launch")]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in files for path in glob.glob(pattern, recursive=True)):
        with open(path, "rb") as file:
            digest.update(os.path.relpath(path, root).encode() + b"\0" + file.read() + b"\0")
    try:
        with open(os.path.join(root, "ds_moelora", "__init__.py"), encoding="utf-8") as file:
            version = re.search(r'__version__ = "(.+)"', file.read())
    except OSError:
        return "missing"
    return f"{version[1] if version else 'unknown'}, source {digest.hexdigest()[:12]}"


def probe(payload: dict[str, Any]) -> None:
    """Prints `facts` as one line. With `listen` (a port) it is held until stdin ends, for the others to connect to."""
    found = facts(payload)
    with socket.socket() as server:
        if payload["listen"] is not None:
            try:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(("", payload["listen"]))
                server.listen(1024)  # connections are completed by the kernel: nobody needs to accept them
            except OSError as error:
                found["listen_error"] = str(error)
        print(MARK + json.dumps(found), flush=True)
        if payload["listen"] is not None:
            sys.stdin.read()


def _connect(address: str, port: int) -> str | None:
    """Why no connection can be made; None if it can."""
    try:
        socket.create_connection((address, port), timeout=10).close()
    except OSError as error:
        return str(error)
    return None


def main() -> None:
    mode, payload = sys.argv[-2], decode(sys.argv[-1])
    if mode == "serve":
        sys.exit(serve(payload))
    elif mode == "exec":
        enter(payload)
        os.execv(payload["command"][0], payload["command"])
    else:
        probe(payload)


if __name__ == "__main__":
    main()
