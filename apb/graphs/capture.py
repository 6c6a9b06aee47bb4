"""Steps of decoding as CUDA graphs: what has fixed sizes is captured once, attention between the pieces runs as ever.

A decode step is a few hundred short kernels, which a GPU finishes faster than Python launches them. All of them but
attention, the merge and messages have fixed sizes, so the step is cut where it calls attention, and each piece is one
launch: everything from one layer's attention to the next's. Source: the form is that of vLLM's piecewise graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from burst.errors import UserError

WARM_UPS = 2  # runs before a capture: libraries make their handles and workspaces in the first one

Cut = Callable[..., Tensor]  # stands in for attention: what it is given -> its output
T = TypeVar("T")


class Graph(Protocol):
    """Work that has been captured."""

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


class Capture(Protocol):
    """A way of capturing work."""

    @property
    def session(self) -> Any:
        """A context for warming up and capturing."""
        ...

    def begin(self) -> Graph:
        """Capture what is launched from now on, until ``capture_end``."""
        ...


class CudaCapture:
    """Captures one host's work on a stream of its own. Its graphs share memory: none runs while another does."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        with torch.cuda.device(device):  # a pool belongs to the current device
            self._memory = torch.cuda.MemPool()  # held here: a bare handle dies with the last graph that used it

    @property
    @contextmanager
    def session(self) -> Iterator[None]:
        """Leave the current stream's order as it is: captured work comes after what is launched there already."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)

    def begin(self) -> Graph:
        """Capture this thread's launches; those of others, such as NCCL's watchdog, are not ours to forbid."""
        graph = torch.cuda.CUDAGraph()
        pool = self._memory.id
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # type: ignore[arg-type]  # torch's own id
        return graph


class Pieces(Generic[T]):
    """``fn(*inputs, cut)`` as graphs between its calls of ``cut``; calls with inputs of the same shapes replay them.

    The inputs of ``attend`` and the result are in memory that all graphs of one ``capture`` share: they are valid until
    anything else of that capture runs, these pieces or others. What is to last has to be copied.
    """

    def __init__(
        self, fn: Callable[..., T], inputs: Sequence[Tensor], blank: Callable[..., Tensor], capture: Capture
    ) -> None:
        """``blank`` makes room for what attention will return, given what it is given.

        Raises UserError, from what went wrong first, where ``fn`` cannot be captured.
        """
        self._inputs = [x.clone() for x in inputs]
        self._capture, self._blank = capture, blank
        self._graphs: list[Graph] = []
        self._calls: list[tuple[tuple[Any, ...], Tensor]] = []
        with capture.session:
            for _ in range(WARM_UPS):
                fn(*self._inputs, lambda *given: blank(*given).zero_())
            self._result = self._captured(fn)

    def _captured(self, fn: Callable[..., T]) -> T:
        over = False
        self._graphs.append(self._capture.begin())
        try:
            result = fn(*self._inputs, self._cut)
            self._graphs[-1].capture_end()
            over = True
        except RuntimeError as error:
            raise UserError(
                "a step of decoding cannot be captured as a graph",
                given=str(error).partition("\n")[0],
                allowed="steps of fixed sizes that read no values, and room for their graphs",
                remedy="Set decode.graphs=false.",
            ) from error
        finally:
            if not over:
                with suppress(RuntimeError):  # a capture that failed may have ended already
                    self._graphs[-1].capture_end()
        return result

    def __call__(self, inputs: Sequence[Tensor], attend: Cut) -> T:
        """Run, with ``attend`` for what the pieces are cut at."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        for graph, (given_here, out) in zip(self._graphs, self._calls, strict=False):
            graph.replay()
            out.copy_(attend(*given_here))
        self._graphs[-1].replay()
        return self._result

    def _cut(self, *given: Any) -> Tensor:
        self._graphs[-1].capture_end()
        out = self._blank(*given)
        self._calls.append((given, out))
        self._graphs.append(self._capture.begin())
        return out
