"""Linear layers (gated delta rule, Kimi delta attention, Mamba2): a short convolution, then a recurrence.

Each stretch of a host gets the last inputs of the convolution before it straight from their owners, runs its recurrence
from zero, and all exchange the stretches' maps of states: then every host knows the state before each of its stretches,
by which it corrects its outputs, and the state at the end, from which new tokens go on without a message.

Shapes: B batch (1), S tokens, C channels, R reach (kernel - 1), H value heads, K key dim, V value dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

from torch import Tensor

from apb.layers.base import LAYERS, LayerCache, LayerKind, Place
from apb.layers.call import Call
from apb.layers.halo import Reach, exchanged, picked, traffic
from apb.layers.linear_chunks import LinearChunks
from apb.layers.mixing import ConvCall, LinearCache, ScanCall
from apb.layers.recurrences.base import KDA_PIECE, PIECE, Affine, Mapped
from apb.layers.recurrences.convolution import behind
from apb.layers.recurrences.exchange import Sizes, moves, states
from apb.layers.sharding import Segment, Sharding, union

_MANY = 16  # hosts; from here on maps travel by doubling, or a layer would hold hundreds of them
Recurrence = Literal["delta", "kda", "mamba2"]


@LAYERS.register("linear", "a recurrence behind a short convolution; its state is kept on every host")
@dataclass(frozen=True)
class Linear(LayerKind):
    """Sizes of a linear layer: heads of keys and values (in Mamba2 groups and heads), their dims (state and head dim).

    ``chunk``: tokens of a chunk of the model's function; ``scan``: how the maps of stretches travel.
    """

    sharded: ClassVar[bool] = False
    part: ClassVar[str] = "recurrence"

    recurrence: Recurrence
    channels: int  # of the convolution
    kernel: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    chunk: int = 64
    scan: Literal["auto", "gather", "doubling"] = "auto"

    @property
    def sizes(self) -> Sizes:
        """Shapes of a stretch's map."""
        k, v = self.key_dim, self.value_dim
        if self.recurrence == "mamba2":
            return Sizes((1, self.value_heads, 1, 1), (1, self.value_heads, v, k))
        return Sizes((1, self.value_heads, k, k), (1, self.value_heads, k, v))

    @property
    def family(self) -> str:
        """The name of the inputs that its recurrence takes."""
        return "mamba2" if self.recurrence == "mamba2" else "delta"

    def way(self, hosts: int) -> str:
        """Route of the maps: a gather is one round, but every host holds all maps; see ``recurrences.exchange``."""
        return ("gather" if hosts < _MANY else "doubling") if self.scan == "auto" else self.scan

    @property
    def reach(self) -> Reach:
        """Distance that the convolution looks back."""
        return Reach(self.kernel)

    def state_bytes(self, e: int) -> int:
        """Bytes of a state, fp32 (fp64 for fp64 models)."""
        return self.sizes.numbers(whole=False) * max(4, e)

    def messages(self, sharding: Sharding, rank: int, e: int, kept: bool = True) -> dict[str, dict[int, int]]:
        whole, column, wide = _joined(sharding), self.channels * e, max(4, e)
        sends = traffic(self.reach, whole, kept)[rank]
        conv = {peer: sum(stop - start for start, stop in parts) * column for peer, parts in sends}
        state = dict[int, int]()
        for move in itertools.chain(*moves(self.way(whole.hosts), owners(whole), whole.hosts, kept, rank)):
            if move.src == rank:
                state[move.dst] = state.get(move.dst, 0) + self.sizes.numbers(move.whole) * wide
        return {"conv": conv, "state": state}

    @property
    def width(self) -> int:
        return self.chunk

    def flops(self, sharding: Sharding, rank: int) -> int:
        """Those of the recurrence, of maps, and of the correction of outputs; composing maps included."""
        whole, total = _joined(sharding), 0
        k, v, h = self.key_dim, self.value_dim, self.value_heads
        for start, stop in whole.spans[rank]:
            width = v if not start or self.recurrence == "mamba2" else v + k
            total += (stop - start) * (self._token_flops(width) + (2 * h * k * v if start else 0))
        steps = len(whole.stretches) - 1
        return total + steps * h * k * v * (2 if self.recurrence == "mamba2" else 2 * k)

    def _token_flops(self, width: int) -> int:
        """FLOPs of a token in the recurrence with values of ``width``. Source: Gated DeltaNet, the chunk form."""
        k, c = self.key_dim, self.chunk
        if self.recurrence == "mamba2":
            return self.value_heads * (2 * c * (k + width) + 4 * k * width)
        return self.value_heads * (c * (5 * k + 3 * width) + 6 * k * width)

    def step_flops(self, tokens: int, context: int, rank_tokens: int, owner: bool) -> int:
        return tokens * self._token_flops(self.value_dim)

    def held_bytes(self, context: int, e: int) -> int:
        """The state and the convolution's last inputs at the end of the context."""
        return self.state_bytes(e) + (self.kernel - 1) * self.channels * e

    def tail_bytes(self, tokens: int, e: int, owner: bool) -> int:
        """The same behind the last token, beside those at the end of the context."""
        return self.held_bytes(0, e) if tokens else 0

    def tree_bytes(self, rows: int, e: int) -> int:
        """Keys, new values and decays of its rows by value head, and their inputs of the convolution."""
        decays = self.key_dim if self.recurrence == "kda" else 1
        numbers = self.value_heads * (self.key_dim + self.value_dim + decays)
        return rows * (numbers * max(4, e) + self.channels * e)

    def workspace(self, sharding: Sharding, rank: int, e: int, together: int) -> int:
        """Maps of stretches, packed too, and what a piece's chunks take in transformers' own functions."""
        whole, wide = _joined(sharding), max(4, e)
        count, own = len(whole.stretches), len(whole.spans[rank])
        held = count + 2 * own if self.way(whole.hosts) == "gather" else 5 * own
        maps = held * self.sizes.numbers(whole=True) * wide if count > 1 else 0
        longest = max((stop - start for start, stop in whole.spans[rank]), default=0)
        piece = min(together, longest, KDA_PIECE if self.recurrence == "kda" else PIECE)
        return maps + piece * self.value_heads * self._chunk_numbers(widened=count > 1) * wide

    def _chunk_numbers(self, *, widened: bool) -> int:
        """Numbers of a token and head that live at once in transformers' chunk forms (5.24), counted there."""
        k, v, c = self.key_dim, self.value_dim, self.chunk
        if self.recurrence == "mamba2":
            return (7 * k + 17 * v) // 2 + 3 * c
        width = v + k if widened else v
        return 3 * c * k + 3 * k + 3 * width + c if self.recurrence == "kda" else 5 * k + 6 * width + c + 8

    def row_work_bytes(self, e: int) -> int:
        """Bytes of what the convolution is given and gives, or the gate, the outputs and their norm in fp32."""
        values, gated = self.value_heads * self.value_dim, 3 * max(4, e)
        if self.recurrence == "mamba2":
            return (self.channels + values) * e + values * (gated + max(4, e))
        decays = self.value_heads * self.key_dim * max(4, e) if self.recurrence == "kda" else 0
        return max((3 * self.channels + values) * e, values * (2 * e + gated)) + decays

    def whole_row_bytes(self, e: int, exact: bool) -> int:
        return 0  # chunks run one after another, with the state between them

    def prefill(self, segments: Sequence[Segment], place: Place, reads: LayerCache | None = None) -> LinearPrefill:
        assert reads is None
        return LinearPrefill(self, segments, place)


@lru_cache(maxsize=256)
def _joined(sharding: Sharding) -> Sharding:
    """Return the same with neighbouring stretches of a host as one."""
    return Sharding(tuple(tuple(union(list(held))) for held in sharding.spans))


def owners(sharding: Sharding) -> tuple[int, ...]:
    """Return the hosts of all stretches in position order."""
    return tuple(host for _, _, host in sharding.stretches)


class LinearPrefill:
    """The run of one linear layer during a prefill; see ``LayerPrefill``."""

    def __init__(self, kind: Linear, segments: Sequence[Segment], place: Place) -> None:
        self.kind, self._transport = kind, place.transport
        self._segments = [Segment(s.start, s.stop, _joined(s.sharding), s.kept) for s in segments]
        self.cache = LinearCache(kind.kernel)

    def __call__(self, call: Call) -> Tensor:
        """Run the convolution (B, C, S) or the recurrence (B, S, H, V) of all tokens, segment by segment."""
        outs = []
        for segment in self._segments:
            if segment.start == segment.stop:  # another's anchor
                continue
            part = call.rows(segment.start, segment.stop)
            assert isinstance(part, ConvCall | ScanCall)
            outs.append(self._convolve(segment, part) if isinstance(part, ConvCall) else self._scan(segment, part))
        return outs[0] if len(outs) == 1 else call.join(outs)

    def chunks(self) -> LinearChunks:
        """Return the same run over chunks of the tokens."""
        kind = self.kind
        way = kind.way(self._transport.world)
        return LinearChunks(self._segments, kind.reach, way, kind.sizes, self.cache, self._transport)

    def _convolve(self, segment: Segment, call: ConvCall) -> Tensor:
        t, sharding, reach = self._transport, segment.sharding, self.kind.reach
        sends, step = traffic(reach, sharding, segment.kept), f"layer {call.layer}: convolution"
        held = sharding.spans[t.rank]
        own = [(span, call.x_BCS[:, :, slice(*sharding.rows(t.rank, span))]) for span in held]
        found = [*own, *exchanged(sends, own, call.x_BCS, 2, t, "conv", step)]
        outs = []
        for (start, _), x_BCS in own:
            before = picked(found, (reach(start), start), 2) if start else None
            outs.append(behind(before, x_BCS, call.convolve))
        if segment.kept:
            n = sharding.length
            self.cache.fill_tail(picked(found, (reach(n), n), 2))
        return outs[0] if len(outs) == 1 else call.join(outs)

    def _scan(self, segment: Segment, call: ScanCall) -> Tensor:
        t, sharding = self._transport, segment.sharding
        numbers = [i for i, (_, _, host) in enumerate(sharding.stretches) if host == t.rank]
        runs: dict[int, Mapped | Tensor] = {}
        maps: dict[int, Affine] = {}
        for number, span in zip(numbers, sharding.spans[t.rank], strict=True):
            stretch = call.scan.rows(*sharding.rows(t.rank, span))
            if span[0]:
                mapped = stretch.mapped()
                runs[number], maps[number] = mapped, mapped.affine
            else:  # nothing comes before it
                runs[number], state = stretch.run(None)
                maps[number] = Affine(None, state)
        way, step = self.kind.way(t.world), f"layer {call.layer}: states"
        before, end = states(way, maps, owners(sharding), segment.kept, t, self.kind.sizes, step)
        if end is not None:
            self.cache.fill_state(end)
        outs = [run if isinstance(run, Tensor) else run.corrected(before[i]) for i, run in runs.items()]
        return outs[0] if len(outs) == 1 else call.join(outs)
