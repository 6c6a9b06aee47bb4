"""Recording of one rank as a program for ``burst.planner.timeline``: every call, and the work between two calls.

A recorder is given to a transport (``Transport.recorder``). Work is timed on the rank's own clock, on GPUs by CUDA
events. The time inside the transport's calls is left out.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from burst.planner.events import Begin, Busy, Finish, TimelineEvent
from burst.transport.base import Handle, Message


class TraceRecorder:
    """A recorder of one rank. ``events`` is its program. ``during`` names parts of the work.

    Parts do not nest: the outer one counts. ``clock`` is in seconds, ``time.thread_time`` where work has one thread on
    a shared machine; on a GPU it is not read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, device: torch.device | str = "cpu") -> None:
        self.events: list[TimelineEvent] = []
        self._clock, self._device = clock, torch.device(device)
        self._began: Any = None
        self._parts: list[tuple[str, Any, Any]] = []
        self._depth = 0
        self._starts = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens inside, from nothing."""
        self.events.clear()
        self._depth, self._starts, self._parts = 0, 0, []
        self._begin()
        yield  # what is left by an exception is forgotten by the next recording
        self._end()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count the work done inside as ``part``."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def enter(self, part: str) -> None:
        """Begin a part, for hooks that cannot be a context."""
        self._depth += 1
        if self._depth == 1:
            self._parts.append((part, self._stamp(), None))

    def leave(self) -> None:
        """End the part that was begun last."""
        self._depth -= 1
        if self._depth == 0:
            part, start, _ = self._parts.pop()
            self._parts.append((part, start, self._stamp()))

    def follow(
        self, call: Callable[[], Handle], sends: Sequence[Message], recvs: Sequence[Message], to: int | None, step: str
    ) -> Handle:
        """Make a transport's call and record it; its receives are forwarded to rank ``to``."""
        self._end()
        name, self._starts = self._starts, self._starts + 1
        sizes = [tuple((m.peer, m.tensor.numel() * m.tensor.element_size()) for m in ms) for ms in (sends, recvs)]
        self.events.append(Begin(name, sizes[0], sizes[1], to, step))
        handle = call()
        self._begin()
        return handle

    def wait(self, handle: Handle, name: int) -> None:
        """Wait for a recorded call and record that."""
        self._end()
        self.events.append(Finish(name))
        handle.wait()
        self._begin()

    @property
    def last(self) -> int:
        """The name of the call recorded last."""
        return self._starts - 1

    def _begin(self) -> None:
        self._began = self._stamp()

    def _end(self) -> None:
        """Close the segment of work under way; the parts' times are read now, when the device is done."""
        assert self._began is not None and self._depth == 0, "a call inside a named part, or outside of recording()"
        stop = self._stamp()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        parts: defaultdict[str, float] = defaultdict(float)
        for name, a, b in self._parts:
            parts[name] += self._between(a, b)
        self.events.append(Busy(self._between(self._began, stop), tuple(parts.items())))
        self._began, self._parts = None, []

    def _stamp(self) -> Any:
        if self._device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @staticmethod
    def _between(start: Any, stop: Any) -> float:
        return stop - start if isinstance(start, float) else float(start.elapsed_time(stop)) / 1e3
