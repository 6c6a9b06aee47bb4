"""A connection between rank 0 and another rank on which each end knows that the other has the run's key.

Every message carries a code of its direction, its number and its bytes, made with a key of this connection alone: none
can be made up, changed, sent again, or sent to another rank. What travels can be read by whoever carries it.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time

_MAGIC = b"apb-run1"
_SIZE = 32  # bytes of a nonce, and of a code
_HEAD = struct.Struct("<Q")
_RANK = struct.Struct("<I")
_CHUNK = 1 << 20
_LARGEST = 1 << 36  # bytes of a message: more is no message
_UP, _DOWN = b"up", b"down"


class LineError(ConnectionError):
    """The other end is gone, does not have the key, or says what it should not."""


class Line:
    """One end; ``send`` from any thread, ``receive`` from one."""

    def __init__(self, sock: socket.socket, key: bytes, out: bytes, into: bytes) -> None:
        self._sock, self._key, self._out, self._into = sock, key, out, into
        self._sent = self._received = 0
        self._lock = threading.Lock()
        sock.settimeout(None)

    def send(self, payload: bytes, *, patient: bool = True) -> None:
        """Send a message; without patience none where another is still being sent. Raises LineError."""
        if not self._lock.acquire(blocking=patient):
            return
        try:
            code = self._code(self._out, self._sent, payload)
            self._sent += 1
            self._sock.sendall(_HEAD.pack(len(payload)) + code)
            self._sock.sendall(payload)
        except OSError as error:
            raise LineError(str(error)) from error
        finally:
            self._lock.release()

    def receive(self) -> bytes:
        """Wait for the next message; raises LineError at the end of the line."""
        head = _exactly(self._sock, _HEAD.size + _SIZE)
        (length,) = _HEAD.unpack_from(head)
        if length > _LARGEST:
            raise LineError(f"a message of {length} bytes")
        payload = _exactly(self._sock, length)
        if not hmac.compare_digest(head[_HEAD.size :], self._code(self._into, self._received, payload)):
            raise LineError("a message that was not made with this run's key")
        self._received += 1
        return payload

    def close(self) -> None:
        """Hang up; may be called twice, from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _code(self, direction: bytes, number: int, payload: bytes) -> bytes:
        made = hmac.new(self._key, direction + _HEAD.pack(number), "sha256")
        made.update(payload)
        return made.digest()


def accept(sock: socket.socket, key: bytes, within_s: float) -> tuple[int, Line]:
    """Let a rank in that shows the key in time; return its rank and the line. Raises LineError for anyone else."""
    until = time.monotonic() + within_s
    sock.settimeout(within_s)
    mine = secrets.token_bytes(_SIZE)
    try:
        sock.sendall(_MAGIC + mine)
        hello = _exactly(sock, _RANK.size + 2 * _SIZE, until)
        (rank,) = _RANK.unpack_from(hello)
        both = mine + hello[: _RANK.size + _SIZE]
        if not hmac.compare_digest(hello[-_SIZE:], _sign(key, b"follower", both)):
            raise LineError("who called does not have this run's key")
        sock.sendall(_sign(key, b"leader", both))
    except OSError as error:
        sock.close()
        raise error if isinstance(error, LineError) else LineError(str(error)) from error
    return rank, Line(sock, _sign(key, b"line", both), _DOWN, _UP)


def call(sock: socket.socket, key: bytes, rank: int, within_s: float) -> Line:
    """Introduce this rank to rank 0; raises LineError when who answers does not show the key in time."""
    until = time.monotonic() + within_s
    sock.settimeout(within_s)
    try:
        opening = _exactly(sock, len(_MAGIC) + _SIZE, until)
        if not opening.startswith(_MAGIC):
            raise LineError("who answers is not a process of this run")
        hello = _RANK.pack(rank) + secrets.token_bytes(_SIZE)
        both = opening[len(_MAGIC) :] + hello
        sock.sendall(hello + _sign(key, b"follower", both))
        if not hmac.compare_digest(_exactly(sock, _SIZE, until), _sign(key, b"leader", both)):
            raise LineError("who answers does not have this run's key")
    except OSError as error:
        sock.close()
        raise error if isinstance(error, LineError) else LineError(str(error)) from error
    return Line(sock, _sign(key, b"line", both), _UP, _DOWN)


def _sign(key: bytes, role: bytes, both: bytes) -> bytes:
    return hmac.new(key, role + both, "sha256").digest()


def _exactly(sock: socket.socket, count: int, until: float | None = None) -> bytes:
    """Read so many bytes, by a time of the monotonic clock if there is one; memory is taken as they come, not as they
    are announced."""
    found = bytearray()
    while len(found) < count:
        try:
            if until is not None:
                sock.settimeout(max(1e-3, until - time.monotonic()))
            part = sock.recv(min(_CHUNK, count - len(found)))
        except OSError as error:
            raise LineError(str(error)) from error
        if not part:
            raise LineError("the other end hung up")
        found += part
    return bytes(found)
