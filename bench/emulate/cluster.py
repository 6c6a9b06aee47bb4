"""Virtual hosts whose every segment of work, and every call of the transport, is recorded."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from apb.clusters.virtual import VirtualCluster
from apb.host.messages import HostSpec, OnEvent
from apb.layers.recurrences.base import Mapped, Scan
from apb.models.adapter import Adapter
from burst.kernels import Kernel, capped
from burst.kernels.base import Backward, Forward
from burst.planner.events import TimelineEvent
from burst.planner.trace import TraceRecorder

_here = threading.local()  # the recorder of the virtual rank that this thread is


def _timed(kernel: Kernel, recorder: TraceRecorder) -> Kernel:
    """Return the kernel with its forward calls counted as attention, those with soft caps included."""

    def counted(forward: Forward) -> Forward:
        def block(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
            with recorder.during("attention"):
                return forward(q, k, v, causal, scale)

        return block

    def with_cap(cap: float) -> tuple[Forward, Backward]:
        made = capped(kernel, cap)
        return counted(made.block), made.block_backward

    return replace(kernel, block=counted(kernel.block), capped=with_cap)


class EmulatedCluster(VirtualCluster):
    """Virtual hosts over a loaded model; ``programs`` are what they did in the last call."""

    def __init__(self, spec: HostSpec, hosts: int, adapter: Adapter, nodes: Sequence[int]) -> None:
        super().__init__(spec, hosts, adapter, nodes)
        clock = time.thread_time if adapter.device.type == "cpu" and spec.threads == 1 else time.perf_counter
        self._recorders = [TraceRecorder(clock, adapter.device) for _ in range(hosts)]
        for host, recorder in zip(self._hosts, self._recorders, strict=True):
            host.kernel = _timed(host.kernel, recorder)

    @property
    def programs(self) -> list[list[TimelineEvent]]:
        """Each host's work and calls in the last call, for ``burst.planner.timeline``."""
        return [list(recorder.events) for recorder in self._recorders]

    def call(self, method: str, per_host: Sequence[tuple[Any, ...]], on_event: OnEvent | None = None) -> list[Any]:
        """Run one method on every host, recorded."""

        def run(t: Any) -> Any:
            recorder = _here.recorder = t.recorder = self._recorders[t.rank]
            try:
                with recorder.recording():
                    return getattr(self._hosts[t.rank], method)(*per_host[t.rank])
            finally:
                t.recorder = _here.recorder = None

        with _linear_layers(), _recurrences():
            return self._world.run(run)


@contextmanager
def _linear_layers() -> Iterator[None]:
    """Count what linear layers do as such, in whichever rank's thread they run."""

    def before(module: nn.Module, _inputs: Any) -> None:
        recorder: TraceRecorder | None = getattr(_here, "recorder", None)
        if recorder is not None and isinstance(module, nn.Linear):
            recorder.enter("linear")

    def after(module: nn.Module, _inputs: Any, _output: Any) -> None:
        recorder: TraceRecorder | None = getattr(_here, "recorder", None)
        if recorder is not None and isinstance(module, nn.Linear):
            recorder.leave()

    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recurrences() -> Iterator[None]:
    """Count what recurrences do as such, and the correction of their outputs."""

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **options: Any) -> Any:
            recorder: TraceRecorder | None = getattr(_here, "recorder", None)
            with recorder.during("recurrence") if recorder is not None else nullcontext():
                return method(*args, **options)

        return run

    kinds = [(kind, ("run", "mapped", "map_on", "tree")) for kind in Scan.__subclasses__()]
    found = [(kind, name, vars(kind)[name]) for kind, names in (*kinds, (Mapped, ("corrected",))) for name in names]
    for kind, name, method in found:
        setattr(kind, name, counted(method))
    try:
        yield
    finally:
        for kind, name, method in found:
            setattr(kind, name, method)
