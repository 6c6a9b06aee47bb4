"""Runs the attention of an exact plan on one host, by burst.

Shapes: B batch (1), S tokens of this host, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from apb.kv.layer import LayerKV, Projections
from apb.plan.plan import PrefillPlan
from burst.execution.blocks import Blocks
from burst.execution.buffers import Form
from burst.execution.execute import Execution
from burst.kernels import Kernel
from burst.transport import Transport


class ExactAttention:
    """Stands in for a model's attention during an exact prefill; keeps this host's KV.

    Hosts have agreed on the plan, and with it on every shape and message, so layers need no agreement of their own.
    """

    needs_projections = False

    def __init__(
        self, plan: PrefillPlan, transport: Transport, kernel: Kernel, on_layer: Callable[[int], None]
    ) -> None:
        assert plan.spread is not None
        self.kept: list[LayerKV] = []
        self._transport, self._kernel, self._on_layer = transport, kernel, on_layer
        self._schedule = plan.spread.program(plan.shape, transport.nodes)
        transport.open(self._schedule.channels)
        if self._schedule.heads:  # now: the first layer would wait for the device
            self._schedule.places(transport.rank, transport.device)

    def __call__(
        self,
        layer: int,
        q_BHSD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        scale: float,
        projections: Projections | None,
    ) -> Tensor:
        """Attend over all hosts and return the attention output (B, S, H, D)."""
        kept = LayerKV(k_BKSD.clone(), v_BKSD.clone())
        self.kept.append(kept)
        run = Execution(
            self._schedule,
            self._transport,
            Blocks(self._kernel, scale),
            Form(q_BHSD.shape[0], q_BHSD.shape[1], k_BKSD.shape[1], q_BHSD.shape[3], v_BKSD.shape[3], q_BHSD.dtype),
            {"q": q_BHSD, "k": kept.k_BKTD, "v": kept.v_BKTD},
            label=f"layer {layer}:",
        )
        out_BHSD, _ = run.forward()
        self._on_layer(layer)
        return out_BHSD.transpose(1, 2)
