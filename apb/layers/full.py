"""Full attention (MHA, GQA, MQA): every token sees all before it; rows stay with their owners.

Shapes: B batch (1), H query heads, K kv heads, S new tokens, T cached tokens, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apb.layers.base import LAYERS, LayerCache, Step
from apb.layers.call import AttentionCall, Call
from apb.layers.partials import finish, merge_all
from apb.layers.rows import LayerKV, Rows
from apb.layers.softmax import Softmax, attend_cached
from burst.kernels.merge import Accumulator
from burst.kernels.reference import attend


@LAYERS.register("full", "causal attention over all tokens")
@dataclass(frozen=True)
class Full(Softmax):
    """Causal attention over all tokens, its context sharded."""

    sharded: ClassVar[bool] = True

    def reach(self, position: int) -> int:
        return 0

    def cache(self, reads: LayerCache | None = None) -> FullCache:
        assert reads is None or isinstance(reads, FullCache)
        return FullCache(self, reads=reads)

    def partial_bytes(self, e: int) -> int:
        """The output and its LSE (fp32; fp64 for fp64 models)."""
        return self.q_heads * (self.v_dim * e + max(4, e))

    def tail_bytes(self, tokens: int, e: int, owner: bool) -> int:
        return tokens * self.row_bytes(e) if owner and self.reads is None else 0

    def step_flops(self, tokens: int, context: int, rank_tokens: int, owner: bool) -> int:
        pairs = tokens * rank_tokens + (tokens * (tokens + 1) // 2 if owner else 0)
        return self.pair_flops * self.q_heads * pairs


class FullCache:
    """One host's rows of a full layer: its part of the context, and on the owner the tail.

    A cache that ``reads`` another's has no rows of its own; that one has taken the step's new rows in already.
    """

    def __init__(self, kind: Full, context: LayerKV | None = None, reads: FullCache | None = None) -> None:
        self.kind, self._reads = kind, reads
        self._context, self._tail = context, Rows()

    @property
    def context(self) -> LayerKV:
        """This host's rows of the context."""
        found = self._reads.context if self._reads is not None else self._context
        assert found is not None
        return found

    @property
    def tail(self) -> LayerKV | None:
        """The rows of tokens after the context, on the owner; None when there are none."""
        return self._reads.tail if self._reads is not None else self._tail.view()

    def fill(self, context: LayerKV) -> None:
        """Keep this host's rows of the context."""
        if self._reads is None:
            self._context = context

    def append(self, kv: LayerKV) -> None:
        """Add rows after the context."""
        self._tail.append(kv.k_BKTD, kv.v_BKTE)

    def attend(self, call: Call, step: Step) -> Tensor:
        """Attend to all members' rows, merged exactly; the owner keeps the new ones. Returns (B, S, H, E)."""
        assert isinstance(call, AttentionCall)
        q_BHSD, scale, own = call.q_BHSD, call.scale, Accumulator()
        kernel = self.kind.kernel(step.place.kernel)
        attend_cached(own, q_BHSD, self.context, kernel, scale)
        if step.owner:
            tail = self.tail
            earlier = tail if tail is None or self._reads is None else tail.rows(0, len(tail) - step.tokens)
            if earlier is not None and len(earlier):
                attend_cached(own, q_BHSD, earlier, kernel, scale)
            if step.parents is None:
                own.add(*kernel(q_BHSD, call.k_BKSD, call.v_BKSE, causal=True, scale=scale))
            else:  # the only keys of a draft tree that need a mask are its own
                seen, cap = step.seen_MM, self.kind.soft_cap
                own.add(*attend(q_BHSD, call.k_BKSD, call.v_BKSE, False, scale, seen_ST=seen, soft_cap=cap))
            if self._reads is None:
                self.append(LayerKV(call.k_BKSD, call.v_BKSE))
        if len(step.members) > 1:
            own = merge_all(own, q_BHSD.dtype, step.place.transport, f"layer {call.layer}: partial outputs")
        return finish(own, q_BHSD.dtype, call.sinks_H)

    def keep(self, rows: Sequence[int]) -> None:
        self._tail.keep(rows)

    def restart(self) -> None:
        self._tail.truncate(0)

    def fork(self, reads: LayerCache | None = None) -> FullCache:
        assert reads is None or isinstance(reads, FullCache)
        out = FullCache(self.kind, self._context, reads)
        out._tail = self._tail.copy()
        return out
