"""The host file: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from launch.checks.errors import UserError
from launch.cluster.hosts import read_hostfile


def read(folder: Path, text: str) -> dict[str, int]:
    path = folder / "hostfile"
    path.write_text(text)
    return read_hostfile(path)


def test_hosts_slots_and_order(tmp_path: Path):
    text = "# two nodes\r\nnode-b slots=4\r\n\n\tnode-a.example.org\tslots=2  # old\n10.0.0.3 slots=1"
    assert list(read(tmp_path, text).items()) == [("node-b", 4), ("node-a.example.org", 2), ("10.0.0.3", 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("node", "should be `node slots=N`"),
        ("node slots=0", "from 1 to 1024"),
        ("node slots=8x", "from 1 to 1024"),
        ("node slots=-1", "from 1 to 1024"),
        ("node slots=\u0661", "from 1 to 1024"),
        ("node slots=99999999999", "from 1 to 1024"),
        ("node slots = 2", "nothing else"),
        ("node slots=2 max_slots=4", "nothing else"),
        ("-oProxyCommand=x slots=1", "no host name"),
        ("node; slots=1", "no host name"),
        ("$(id) slots=1", "no host name"),
        ("node[1-3] slots=1", "no host name"),
        ("me@node slots=1", "~/.ssh/config"),
        ("::1 slots=1", "no host name"),
        ("n" * 254 + " slots=1", "254 characters"),
        ("\ufeffnode slots=1", "no host name"),
        ("node\u00a0slots=1", "no host name"),
        ("# nothing", "names no host"),
        ("", "names no host"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str):
    with pytest.raises(UserError, match="hostfile") as error:
        read(tmp_path, line)
    assert message in str(error.value)


def test_all_bad_lines_are_named(tmp_path: Path):
    with pytest.raises(UserError) as error:
        read(tmp_path, "a slots=2\n-x slots=1\nA slots=2\nb slots=0\n")
    assert [f"line {n}:" in str(error.value) for n in (1, 2, 3, 4)] == [False, True, True, True]
    assert "A is already in line 1" in str(error.value)


def test_unreadable_files(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "long").write_bytes(b"# " + b"x" * (1 << 20))
    for name in ("absent", "binary", "long", "", "null\0byte"):
        with pytest.raises(UserError, match="--hostfile"):
            read_hostfile(tmp_path / name)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "", "", "#", " ", "\t"]),
            st.sampled_from(["a", "b", "c", "a.0", "0-b", "-a", "a;b", ""]),
            st.sampled_from([" ", " ", "\t ", "\u00a0"]),
            st.sampled_from(["slots=1", "slots=20", "slots=3 # x", "slots=1#x", "slots=2x"]),
        ).map("".join),
        max_size=3,
    ).map("\n".join)
)
def test_deepspeed_reads_the_same(tmp_path_factory: pytest.TempPathFactory, text: str):
    """Whatever is accepted, DeepSpeed accepts too, and understands alike."""
    from deepspeed.launcher.runner import _parse_hostfile

    try:
        hosts = read(tmp_path_factory.getbasetemp(), text)
    except UserError:
        return
    event("accepted")
    assert dict(_parse_hostfile(text.split("\n"))) == hosts
