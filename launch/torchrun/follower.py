"""A rank other than 0: does what rank 0 commands, and ends by itself when it hears nothing more."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from burst.errors import HostFailure, UserError
from launch.hosts.vigil import Vigil, beat_s
from launch.torchrun.key import KeyFile, given_key, no_key
from launch.torchrun.line import LineError, call
from launch.torchrun.messages import Beat, Do, Done, Hello, Ping, Stop, codec
from launch.torchrun.place import MEET_S, Place
from launch.torchrun.seat import Seat

SHAKE_S = 30.0  # for a process that listens to answer
AFTER_S = 3.0  # torchrun ends what is there after rank 0; whoever is still there then ends by itself
BEHIND_S = 0.5  # for torchrun to notice the end of one process before the next one's
LEAVE_S = 30.0  # for rank 0 to end after it has said so


class Follower:
    """Joins rank 0; raises UserError without the run's key, or when rank 0 does not come."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._seat = Seat(place)
        try:
            place.store.set_timeout(timedelta(seconds=MEET_S))
            port = int(place.store.get("meet"))
            key = given_key() or KeyFile(place.run).read()
            if key is None:
                place.store.set("no key", str(place.rank))
                raise no_key()
            sock = socket.create_connection((place.address, port), timeout=SHAKE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._line = call(sock, key, place.rank, SHAKE_S)
        except (OSError, ValueError, dist.DistError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"rank {place.rank} cannot reach rank 0: {str(error).splitlines()[0]}",
                given=f"rank 0 at {place.address}",
                allowed="a machine whose ports this one reaches, and the same key on both",
                remedy="Check the network between the machines, and what docs/clusters.md says of the key.",
            ) from error
        self._line.send(codec().encode(Hello(place.node, os.getpid())))
        self._gone = threading.Event()  # rank 0 has hung up
        self._due: queue.SimpleQueue[Do | Stop] = queue.SimpleQueue()
        self._vigil = Vigil((0,), MEET_S)

    def follow(self) -> int:
        """Do what rank 0 commands until it says stop; return the exit code. Ends the process when rank 0 is lost."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a word; rank 0 has something to say
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        while isinstance(due := self._due.get(), Do):
            done = codec().encode(Done(due.number, self._seat.perform(due.command)))
            with contextlib.suppress(LineError):  # the listening thread finds out, too, and ends this process
                self._line.send(done)
        self._seat.disconnect()
        if due.failed:  # rank 0 is the one that failed: it ends first, and torchrun reports the first
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
            self._gone.wait(LEAVE_S)
            time.sleep(BEHIND_S)
        self._line.close()
        return 1 if due.failed else 0

    def _listen(self) -> None:
        stopped = False
        try:
            while True:
                said = codec().decode(self._line.receive())
                self._vigil.heard(0)
                if isinstance(said, Ping):
                    self._vigil.timeout_s = said.timeout_s
                else:
                    stopped = isinstance(said, Stop)
                    self._due.put(said)
        except LineError as error:
            self._gone.set()
            if not stopped:
                self._end(f"its process ended, or the network between the machines did ({error})")
        except ValueError as error:
            self._end(f"it speaks another version: {error}")

    def _beat(self) -> None:
        beat = codec()
        while True:
            time.sleep(beat_s(self._vigil.timeout_s))
            with contextlib.suppress(LineError):  # the listening thread finds out, too, and says so
                self._line.send(beat.encode(Beat(self._seat.progress.idle_s())), patient=False)
            lost = self._vigil.lost((0,))
            if lost:
                self._end(lost[0])

    def _end(self, text: str) -> None:
        """End this process: without rank 0 there is nothing to do and nobody to tell."""
        from launch.terminal.output import told

        # Where rank 0 is on this machine, its guard has told; torchrun may still be about to end this process.
        time.sleep(AFTER_S)
        if self._place.local_rank == 0:
            told(HostFailure(text, rank=0, step="waiting for commands"))
            sys.stdout.flush()
        os._exit(1)
