"""The line between ranks: who has no key is not heard, and nothing said on it can be changed, moved or said again."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
import time
from pathlib import Path

import pytest

from burst.errors import UserError
from launch.torchrun.key import KEY_ENV, KeyFile, given_key
from launch.torchrun.line import Line, LineError, accept, call

KEY, OTHER = b"k" * 32, b"o" * 32


class Wire:
    """Two connected ends and what went from the first to the second."""

    def __init__(self) -> None:
        self.near, self._tap = socket.socketpair()
        self._out, self.far = socket.socketpair()
        self.passed = bytearray()
        for source, sink, kept in ((self._tap, self._out, True), (self._out, self._tap, False)):
            threading.Thread(target=self._pump, args=(source, sink, kept), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, kept: bool) -> None:
        while data := source.recv(1 << 16):
            if kept:
                self.passed += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def lines(rank: int = 1, key: bytes = KEY, wire: Wire | None = None) -> tuple[Line, Line]:
    """Return the follower's end and the leader's."""
    wire = wire or Wire()
    got: list[Line] = []

    def lead() -> None:
        found, line = accept(wire.far, KEY, 5.0)
        assert found == rank
        got.append(line)

    thread = threading.Thread(target=lead)
    thread.start()
    mine = call(wire.near, key, rank, 5.0)
    thread.join()
    return mine, got[0]


def test_messages_both_ways() -> None:
    follower, leader = lines()
    for payload in (b"", b"x" * 100_000, b"y"):
        sender = threading.Thread(target=follower.send, args=(payload,))
        sender.start()
        assert leader.receive() == payload
        sender.join()
        leader.send(payload[:9])
        assert follower.receive() == payload[:9]
    follower.close()
    follower.close()
    with pytest.raises(LineError, match="hung up"):
        leader.receive()


def test_without_the_key_nobody_is_let_in() -> None:
    for say in (b"", b"GET / HTTP/1.1\r\n\r\n" * 9, pickle.dumps({"a": 1}) * 9, os.urandom(200)):
        near, far = socket.socketpair()
        with near:
            near.sendall(say)
            near.shutdown(socket.SHUT_WR)
            with pytest.raises(LineError):
                accept(far, KEY, 5.0)
        assert far.fileno() == -1
    near, far = socket.socketpair()
    with near, pytest.raises(LineError, match="timed out"):
        accept(far, KEY, 0.1)  # who says nothing is not waited for


def test_who_says_little_at_a_time_is_not_waited_for_longer() -> None:
    near, far = socket.socketpair()
    over = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.1):
                near.sendall(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    with pytest.raises(LineError, match="timed out"):
        accept(far, KEY, 0.5)
    assert time.monotonic() - began < 5.0
    over.set()
    thread.join()
    near.close()


def test_another_key_on_either_side() -> None:
    near, far = socket.socketpair()
    refused: list[LineError] = []

    def lead() -> None:
        try:
            accept(far, KEY, 5.0)
        except LineError as error:
            refused.append(error)

    thread = threading.Thread(target=lead)
    thread.start()
    with pytest.raises(LineError):
        call(near, OTHER, 1, 5.0)
    thread.join()
    assert "does not have this run's key" in str(refused[0])
    near, far = socket.socketpair()
    far.sendall(b"apb-run1" + bytes(64))  # a rank 0 that made its proof up
    with pytest.raises(LineError, match="does not have this run's key"):
        call(near, KEY, 1, 5.0)


def frames(count: int) -> tuple[Line, Line, list[bytes], socket.socket]:
    """Return two ends, messages that the follower said, and a socket into the leader's end."""
    wire = Wire()
    follower, leader = lines(wire=wire)
    start = len(wire.passed)
    for number in range(count):
        follower.send(b"message %d" % number)
        assert leader.receive() == b"message %d" % number
    said = bytes(wire.passed[start:])
    size = len(said) // count
    return follower, leader, [said[i : i + size] for i in range(0, len(said), size)], wire._out


@pytest.mark.parametrize("which", ["again", "changed", "longer", "reflected"])
def test_nothing_is_heard_twice_or_changed(which: str) -> None:
    follower, leader, (frame, *_), into = frames(2)
    if which == "reflected":
        wire = Wire()
        other_follower, other_leader = lines(wire=wire)
        start = len(wire.passed)
        other_follower.send(b"up")
        other_leader.receive()
        wire._tap.sendall(wire.passed[start:])
        with pytest.raises(LineError, match="was not made"):
            other_follower.receive()
        return
    forged = {
        "again": frame,
        "changed": frame[:-1] + b"9",
        "longer": b"\xff" * 8 + frame[8:],
    }[which]
    into.sendall(forged)
    with pytest.raises(LineError, match=r"was not made|bytes"):
        leader.receive()
    assert follower is not None


def test_a_message_for_one_rank_is_not_heard_by_another() -> None:
    _, _, (frame, *_), _ = frames(1)
    wire = Wire()
    _, leader = lines(rank=2, wire=wire)
    wire._out.sendall(frame)
    with pytest.raises(LineError, match="was not made"):
        leader.receive()


def test_the_key_of_one_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("launch.torchrun.key.tempfile.gettempdir", lambda: str(tmp_path))
    file = KeyFile("run 1")
    assert file.read() is None
    key = file.write()
    assert len(key) == 32 and KeyFile("run 1").read() == key and KeyFile("run 2").read() is None
    assert file.write() != key
    (folder,) = tmp_path.iterdir()
    (kept,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, kept.stat().st_mode & 0o777) == (0o700, 0o600)
    file.remove()
    file.remove()
    folder.chmod(0o755)
    with pytest.raises(UserError, match="open to others"):
        KeyFile("run 1")
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="open to others"):
        KeyFile("run 1")


def test_the_key_of_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    assert given_key() is None
    monkeypatch.setenv(KEY_ENV, "0123456789abcdef")
    assert len(given_key() or b"") == 32
    monkeypatch.setenv(KEY_ENV, "short")
    with pytest.raises(UserError, match="too short"):
        given_key()
