"""A linear layer over chunks of a host's tokens: only what goes from one chunk to the next lives, not all of them.

First the few inputs of the convolution that other hosts wait for are made and exchanged; then all chunks run, for the
stretches' maps alone, which are exchanged; then all run again, from the states that the stretches begin with.

Shapes: B batch (1), C channels, S tokens of a chunk, R reach (kernel - 1), H value heads, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from apb.layers.call import Call
from apb.layers.halo import Found, Reach, exchanged, needed, picked, traffic
from apb.layers.mixing import ConvCall, LinearCache, ScanCall
from apb.layers.recurrences.base import Affine
from apb.layers.recurrences.convolution import behind, tail
from apb.layers.recurrences.exchange import Sizes, states
from apb.layers.sharding import Interval, Segment, common
from burst.transport import Transport


@dataclass
class _Stretch:
    """One of the host's stretches: its rows in the pass, its place among all, and what is carried through it."""

    rows: Interval
    number: int
    segment: int
    halo_BCR: Tensor | None = None
    carried_BCR: Tensor | None = None
    affine: Affine | None = None
    state: Tensor | None = None


class LinearChunks:
    """The run of one linear layer over chunks; the calls of a chunk come with the row of their first token."""

    def __init__(
        self,
        segments: Sequence[Segment],
        reach: Reach,
        way: str,
        sizes: Sizes,
        cache: LinearCache,
        transport: Transport,
    ) -> None:
        self._segments, self._reach, self._way, self._sizes = segments, reach, way, sizes
        self._cache, self._transport = cache, transport
        self._again = False
        self._stretches: list[_Stretch] = []
        for at, segment in enumerate(segments):
            held = segment.sharding.spans[transport.rank]
            numbers = [i for i, (_, _, host) in enumerate(segment.sharding.stretches) if host == transport.rank]
            for span, number in zip(held, numbers, strict=True):
                first, last = segment.sharding.rows(transport.rank, span)
                self._stretches.append(_Stretch((segment.start + first, segment.start + last), number, at))

    @property
    def wanted(self) -> list[Interval]:
        """The rows whose inputs of the convolution are exchanged, or stand before another stretch of this host."""
        out = []
        for segment in self._segments:
            for positions in self._wanted(segment):
                first, last = segment.sharding.rows(self._transport.rank, positions)
                out.append((segment.start + first, segment.start + last))
        return out

    def _wanted(self, segment: Segment) -> list[Interval]:
        rank, sharding = self._transport.rank, segment.sharding
        sent = [part for _, parts in traffic(self._reach, sharding, segment.kept)[rank] for part in parts]
        needs = [*sent, *needed(self._reach, sharding, rank, segment.kept)]
        found = [part for span in sharding.spans[rank] for part in common([span], needs)]
        # One at least: what arrives is of its type and size.
        return found or [(start, start + 1) for start, _ in sharding.spans[rank][:1]]

    def exchange(self, inputs: Sequence[Tensor], layer: int) -> None:
        """Exchange halos; ``inputs``: those of the convolution (B, C, S) at the rows ``wanted``."""
        given, reach = iter(inputs), self._reach
        for at, segment in enumerate(self._segments):
            own: Found = [(positions, next(given)) for positions in self._wanted(segment)]
            if not own:  # another's anchor
                continue
            sends = traffic(reach, segment.sharding, segment.kept)
            step = f"layer {layer}: convolution"
            found = [*own, *exchanged(sends, own, own[0][1], 2, self._transport, "conv", step)]
            mine = [stretch for stretch in self._stretches if stretch.segment == at]
            for stretch, (start, _) in zip(mine, segment.sharding.spans[self._transport.rank], strict=True):
                stretch.halo_BCR = self._cache.filled(picked(found, (reach(start), start), 2))
            if segment.kept:
                n = segment.sharding.length
                self._cache.fill_tail(picked(found, (reach(n), n), 2))
        self._restart()

    def settle(self, layer: int) -> None:
        """Exchange maps once all chunks have run; they are to run again."""
        for at, segment in enumerate(self._segments):
            mine = [stretch for stretch in self._stretches if stretch.segment == at]
            maps = {stretch.number: stretch.affine for stretch in mine if stretch.affine is not None}
            owners = tuple(host for _, _, host in segment.sharding.stretches)
            if not mine:
                continue
            step = f"layer {layer}: states"
            before, end = states(self._way, maps, owners, segment.kept, self._transport, self._sizes, step)
            for stretch in mine:
                stretch.state, stretch.affine = before.get(stretch.number), None
            if end is not None:
                self._cache.fill_state(end)
        self._again = True
        self._restart()

    def __call__(self, call: Call, start: int) -> Tensor:
        """Return a chunk's convolution (B, C, S), and its recurrence (B, S, H, V), uninitialised the first time."""
        if isinstance(call, ConvCall):
            return call.join([self._convolve(stretch, call.rows(*rows)) for stretch, rows in self._cut(call, start)])
        assert isinstance(call, ScanCall)
        outs = [self._scan(stretch, call.rows(*rows)) for stretch, rows in self._cut(call, start)]
        return call.join(outs) if self._again else call.blank()

    def _cut(self, call: Call, start: int) -> Iterator[tuple[_Stretch, Interval]]:
        """Yield the stretches that a chunk has tokens of, and their rows in it."""
        for stretch in self._stretches:
            for first, last in common([stretch.rows], [(start, start + call.tokens)]):
                yield stretch, (first - start, last - start)

    def _convolve(self, stretch: _Stretch, call: ConvCall) -> Tensor:
        before = stretch.carried_BCR
        assert before is not None
        stretch.carried_BCR = tail(before, call.x_BCS)
        return behind(before, call.x_BCS, call.convolve)

    def _scan(self, stretch: _Stretch, call: ScanCall) -> Tensor:
        if self._again:
            out_BSHV, stretch.state = call.scan.run(stretch.state)
            return out_BSHV
        if stretch.affine is None and not stretch.number:  # nothing stands before the first stretch
            stretch.affine = Affine(None, call.scan.run(None)[1])
        else:
            stretch.affine = call.scan.map_on(stretch.affine)
        return call.scan.rows(0, 0).blank()

    def _restart(self) -> None:
        for stretch in self._stretches:
            stretch.carried_BCR = stretch.halo_BCR
