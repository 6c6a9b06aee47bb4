"""Virtual hosts whose every segment of work, and every call of the transport, is recorded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from apb.clusters.virtual import VirtualCluster
from apb.host.messages import HostSpec, OnEvent
from apb.models.adapter import Adapter
from burst.kernels import Kernel
from burst.planner.events import TimelineEvent
from burst.planner.trace import TraceRecorder

_here = threading.local()  # the recorder of the virtual rank that this thread is


def _timed(kernel: Kernel, recorder: TraceRecorder) -> Kernel:
    """Return the kernel with its forward calls counted as attention."""

    def block(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        with recorder.during("attention"):
            return kernel.block(q, k, v, causal, scale)

    return replace(kernel, block=block)


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

        with _linear_layers():
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
