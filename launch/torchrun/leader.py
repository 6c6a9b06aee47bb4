"""Rank 0: commands the other ranks, hears them beat, and knows which are lost."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from apb.clusters.outcome import Outcome
from apb.host.messages import HostSpec, OnEvent
from burst.errors import HostFailure
from launch.hosts.meeting import listen, open_store
from launch.hosts.vigil import Vigil, beat_s
from launch.torchrun.key import KeyFile, given_key, no_key
from launch.torchrun.line import Line, LineError, accept
from launch.torchrun.messages import Beat, Call, Command, Do, Done, Hello, Ping, Start, Stop, codec
from launch.torchrun.place import MEET_S, Place
from launch.torchrun.seat import Seat

SHAKE_S = 10.0  # for a caller to show the key
CALLERS = 64  # that may be showing it at a time
LEAVE_S = 3.0  # for the others to leave before rank 0 does
GRACE_S = 5.0  # for the others' answers once one has failed: their connections to it are closed
STUCK_S = 2.0  # for rank 0's own part to end once another rank is lost
SLICE_S = 0.2  # between two such looks signals are heard


class Leader:
    """Waits for the other ranks in the background; they must be there when the first engine starts."""

    def __init__(self, place: Place) -> None:
        self.fit = True  # whether the last command left the hosts ready for another
        self.lost: dict[int, str] = {}  # ranks that are gone for good, and how
        self.seat = Seat(place, self._check)
        self._place = place
        self._lines: dict[int, Line] = {}
        self._hello: dict[int, Hello] = {}
        self._done: dict[tuple[int, int], Outcome] = {}
        self._changed = threading.Condition()
        self._vigil = Vigil(range(1, place.world), MEET_S)
        self._number = self._group = 0
        self._step = ""  # the command under way
        self._stuck_since = math.inf  # a rank is lost, and this one's part has not ended for that yet
        self._stopped = False
        self._store: TCPStore | None = None
        self._file = None if (key := given_key()) else KeyFile(place.run)
        if self._file is not None:
            key = self._file.write()
        assert key is not None
        self._listener = listen(place.address, place.world)
        self._slots = threading.Semaphore(CALLERS)
        place.store.set("meet", str(self._listener.getsockname()[1]))
        for work, args in ((self._accept, (key,)), (self._ping, ())):
            threading.Thread(target=work, args=args, name=work.__name__, daemon=True).start()

    # -- commands ----------------------------------------------------------------------------------------------

    def start(self, spec: HostSpec) -> dict[int, Outcome]:
        """Load the model on all ranks, in a new process group if the old one is not fit."""
        place, fit, self.fit = self._place, self.fit, False
        self._meet(spec.timeout_s)
        self.allow(spec.timeout_s)
        if self._store is None:
            self._store = self.seat.own_store = open_store(place.address, place.world, spec.timeout_s)
        if not (fit and self.seat.joined(spec)):
            self._group += 1
        nodes = tuple(place.node if r == 0 else self._hello[r].node for r in range(place.world))
        return self.command([Start(spec, nodes, self._group, self._store.port)] * place.world)

    def allow(self, timeout_s: float) -> None:
        """Let every rank, this one included, be silent for so long from now on."""
        self._vigil.timeout_s = timeout_s

    def command(self, commands: Sequence[Command], on_event: OnEvent | None = None) -> dict[int, Outcome]:
        """Have every rank do its part, this one in the caller's thread; return what came of it, by rank.

        Ranks that are lost are missing from it, and in ``lost``.
        """
        self._number += 1
        self.fit = False  # unless all of them get to the end
        for rank, line in self._lines.items():
            self._send(rank, line, Do(self._number, commands[rank]))
        self._step = commands[0].method if isinstance(commands[0], Call) else type(commands[0]).__name__.lower()
        outcomes = {0: self.seat.perform(commands[0], on_event)}
        self._step, self._stuck_since = "", math.inf
        self._collect(outcomes)
        self.fit = len(outcomes) == self._place.world and not any(o.error for o in outcomes.values())
        return outcomes

    def stop(self, failed: bool = False) -> None:
        """Let the other ranks end, and end those on this machine that are lost; may be called twice."""
        if self._stopped:
            return
        self._stopped = True
        for rank in self.lost:  # one that is stopped hears nothing, and torchrun would wait for it
            if rank in self._hello and self._hello[rank].node == self._place.node:
                with suppress(ProcessLookupError):
                    os.kill(self._hello[rank].pid, signal.SIGKILL)
        if self._file is not None:
            self._file.remove()
        self._listener.close()
        self.seat.disconnect()
        for rank, line in self._lines.items():
            self._send(rank, line, Stop(failed))
        end = time.monotonic() + (0 if failed else LEAVE_S)
        with self._changed:
            while len(self.lost) < len(self._lines) and time.monotonic() < end:
                self._changed.wait(SLICE_S)

    def beat(self) -> dict[str, Any]:
        """Return what rank 0's guard is to know: its deadline, whether work goes on, the others' processes here."""
        here = [hello.pid for hello in list(self._hello.values()) if hello.node == self._place.node]
        known = {"timeout_s": self._vigil.timeout_s, "idle_s": self.seat.progress.idle_s(), "pids": here}
        if time.monotonic() > self._stuck_since + STUCK_S:  # a wait for the lost rank, which nothing can end
            failure = self.failure(self._step)
            known["lost"] = {"message": failure.message, "rank": failure.rank, "step": failure.step}
        return known

    # -- meeting -----------------------------------------------------------------------------------------------

    def _meet(self, within_s: float) -> None:
        """Wait for all ranks; raises HostFailure when one does not come, UserError when one has no key."""
        end = time.monotonic() + within_s
        with self._changed:
            while len(self._hello) < self._place.world - 1:
                if self._place.store.check(["no key"]):
                    raise no_key()
                if time.monotonic() > end:
                    rank = min(set(range(1, self._place.world)) - self._hello.keys())
                    raise HostFailure(f"its process did not come within {within_s:.0f} s", rank=rank, step="start")
                self._changed.wait(SLICE_S)

    def _accept(self, key: bytes) -> None:
        while len(self._lines) < self._place.world - 1:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed
                return
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._welcome, args=(sock, key), daemon=True).start()
            else:
                sock.close()

    def _welcome(self, sock: socket.socket, key: bytes) -> None:
        """Let a caller in that has the key, and listen to it; others are hung up on."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            rank, line = accept(sock, key, SHAKE_S)
            hello = codec().decode(line.receive())
        except (OSError, ValueError):
            return
        finally:
            self._slots.release()
        with self._changed:
            if not 0 < rank < self._place.world or rank in self._lines or not isinstance(hello, Hello):
                line.close()
                return
            self._lines[rank], self._hello[rank] = line, hello
            self._vigil.heard(rank)
            self._changed.notify_all()
            if len(self._lines) == self._place.world - 1:
                self._listener.close()  # nobody else is expected
        self._listen(rank, line)

    # -- hearing -----------------------------------------------------------------------------------------------

    def _listen(self, rank: int, line: Line) -> None:
        try:
            while True:
                said = codec().decode(line.receive())
                self._vigil.heard(rank, said.idle_s if isinstance(said, Beat) else 0.0)
                if isinstance(said, Done):
                    with self._changed:
                        self._done[said.number, rank] = said.outcome
                        self._changed.notify_all()
        except LineError:
            self._lose({rank: "its process ended: killed, out of memory, or crashed"})
        except ValueError as error:
            self._lose({rank: f"it speaks another version: {error}"})

    def _ping(self) -> None:
        while not self._stopped:
            time.sleep(beat_s(self._vigil.timeout_s))
            ping = codec().encode(Ping(self._vigil.timeout_s))
            for rank, line in list(self._lines.items()):
                if rank not in self.lost:
                    with suppress(LineError):  # its listener finds out, too
                        line.send(ping, patient=False)
            self._lose(self._vigil.lost(self._lines.keys() - self.lost.keys()))

    def _lose(self, found: dict[int, str]) -> None:
        with self._changed:
            self.lost = {**found, **self.lost}
            self._changed.notify_all()
        if found and self._step:
            self._stuck_since = min(self._stuck_since, time.monotonic())
        for rank in found:
            self._lines[rank].close()  # whoever is sending to it stops

    def _check(self) -> None:
        """End this rank's own part of a command once another rank is lost."""
        lost = self.lost
        if lost:
            raise self.failure("another host is lost")

    def failure(self, step: str) -> HostFailure:
        """Return the failure of the first lost rank."""
        lost = self.lost
        rank = min(lost)
        also = [other for other in sorted(lost) if other != rank]
        return HostFailure(lost[rank] + (f" (hosts {also} are lost as well)" if also else ""), rank=rank, step=step)

    def _send(self, rank: int, line: Line, message: Any) -> None:
        if rank in self.lost:
            return
        with suppress(LineError):  # its listener finds out, too
            line.send(codec().encode(message))

    def _collect(self, outcomes: dict[int, Outcome]) -> None:
        """Wait for every rank that is there, or, once one failed, for what its peers have to say about it."""
        end: float | None = None
        with self._changed:
            while len(outcomes) < self._place.world:
                for rank in self._lines.keys() - outcomes.keys():
                    outcome = self._done.pop((self._number, rank), None)
                    if outcome is not None:
                        outcomes[rank] = outcome
                if outcomes.keys() | self.lost.keys() >= set(range(self._place.world)):
                    return
                if end is None and (self.lost or any(o.error for o in outcomes.values())):
                    end = time.monotonic() + GRACE_S
                if end is not None and time.monotonic() > end:
                    return
                self._changed.wait(SLICE_S)
