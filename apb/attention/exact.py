"""Runs the attention of an exact plan on one host, by burst.

Shapes: B batch (1), S tokens of this host, H query heads, K kv heads, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from apb.attention.base import Prefill
from apb.layers.base import ALL_HEADS, LayerKind, Place, ShardedCache
from apb.layers.call import AttentionCall
from apb.layers.rows import LayerKV
from apb.plan.plan import PrefillPlan
from burst.execution.buffers import Form
from burst.execution.execute import Execution
from burst.kernels import Kernel
from burst.schedules import Schedule
from burst.transport import Transport


class ExactAttention(Prefill):
    """Stands in for a model's mixers during an exact prefill; keeps this host's part.

    Hosts have agreed on the plan, and with it on every shape and message, so layers need no agreement of their own.
    """

    def __init__(
        self, plan: PrefillPlan, transport: Transport, kernel: Kernel, on_layer: Callable[[int], None]
    ) -> None:
        assert plan.spread is not None
        super().__init__(plan, Place(transport, kernel), on_layer)
        self._schedules: dict[object, Schedule] = {}
        for kind in plan.shape.sharded:
            made = plan.spread.program(kind.attention_shape(plan.shape.element_size), transport.nodes)
            self._schedules[kind] = made
            transport.open(made.channels)
            if made.heads:  # now: the first layer would wait for the device
                made.places(transport.rank, transport.device)

    def _attend(self, call: AttentionCall, kind: LayerKind, cache: ShardedCache) -> Tensor:
        kept = LayerKV(call.k_BKSD.clone(), call.v_BKSE.clone())
        cache.fill(kept)
        made, q = self._schedules[kind], call.q_BHSD
        s, heads = made.shape, made.heads_of(self._transport.rank)
        own = ALL_HEADS if heads is None else slice(heads.q_start, heads.q_stop)
        run = Execution(
            made,
            self._transport,
            kind.blocks(call, self._kernel, own),
            Form(q.shape[0], s.q_heads, s.kv_heads, s.head_dim, s.value_dim, q.dtype, carried=s.carried),
            {"q": q, "k": kept.k_BKTD, "v": kept.v_BKTE},
            sinks=call.sinks_H,
            label=f"layer {call.layer}:",
            kv=kind.travels,
        )
        out_BHSE, _ = run.forward()
        return out_BHSE.transpose(1, 2)
