"""Runs one host's steps of a prefill plan, layer by layer: selection, passing, attention, and the KV that is kept.

Shapes: B batch (1), S tokens run here (anchor, then block), A anchor tokens, L block tokens, R passed rows,
H query heads, K kv heads, D head dim, Q question tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.chunks import attend_over
from apb.compress.base import Candidates, Compressor, Projections, top_rows
from apb.kv.cache import LayerKV
from apb.plan import Attend, Pass, PrefillPlan, Region, Select, WaitPassing
from burst.kernels import Kernel
from burst.merge import Accumulator
from burst.transport import Handle, Transport


@dataclass(frozen=True)
class QuestionInAnchor:
    """Where the embedded question stands, and how far its queries are rotated on to where it really stands."""

    start: int  # row of the anchor
    length: int
    delta: int  # positions between the anchor's copy and the question itself


class PrefillAttention:
    """Stands in for a model's attention during a prefill; executes the host's plan and keeps the block's KV."""

    def __init__(
        self,
        plan: PrefillPlan,
        transport: Transport,
        kernel: Kernel,
        compressor: Compressor | None,
        question: QuestionInAnchor | None,
        rotate: Callable[[Tensor, int | Tensor, int], Tensor],
        on_layer: Callable[[int], None],
    ) -> None:
        self.plan = plan
        self.host = plan.host_plans[transport.rank]
        self.kept: list[LayerKV] = []
        self.needs_projections = compressor is not None and compressor.needs_projections
        chunk = plan.chunk_tokens
        self._chunk = chunk if chunk is not None and chunk < self.host.tokens_run else None
        self._transport, self._kernel, self._compressor = transport, kernel, compressor
        self._question, self._rotate, self._on_layer = question, rotate, on_layer

    def __call__(
        self,
        layer: int,
        q_BHSD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        scale: float,
        projections: Projections | None,
    ) -> Tensor:
        """Execute the steps of one layer and return the attention output (B, S, H, D)."""
        a = self.host.anchor_len
        # Keys and values by region, in parts: the passing blocks are laid side by side only where they are attended to.
        regions: dict[Region, list[tuple[Tensor, Tensor]]] = {"anchor": [(k_BKSD[:, :, :a], v_BKSD[:, :, :a])]}
        # Copies, so that the kept KV does not hold the anchor's rows in memory.
        block_kv = LayerKV(k_BKSD[:, :, a:].clone(), v_BKSD[:, :, a:].clone())
        regions["block"] = [(block_kv.k_BKTD, block_kv.v_BKTD)]
        self.kept.append(block_kv)
        queries = {"anchor": q_BHSD[:, :, :a], "block": q_BHSD[:, :, a:]}
        merged = {"anchor": Accumulator(), "block": Accumulator()}
        own: Tensor | None = None
        arriving: tuple[Handle, list[Tensor]] | None = None

        for step in self.host.steps:
            match step:
                case Select():
                    own = self._select(step, layer, q_BHSD, block_kv, scale, projections)
                case Pass():
                    arriving = self._pass(step, layer, own, block_kv)
                case WaitPassing():
                    assert arriving is not None
                    handle, passed = arriving
                    handle.wait()
                    regions["passing"] = [(kv[0], kv[1]) for kv in passed]
                case Attend() if self._chunk is not None:
                    # Over its queries' own memory, so all that they attend to must be here: their last step does it.
                    own_steps = [s for s in self.host.steps if isinstance(s, Attend) and s.queries == step.queries]
                    if step is own_steps[-1]:
                        keys = [_concat([part for name in s.keys for part in regions[name]]) for s in own_steps]
                        parts = [(k, v, s.causal) for (k, v), s in zip(keys, own_steps, strict=True)]
                        attend_over(queries[step.queries], parts, self._kernel, scale, self._chunk)
                case Attend():
                    k, v = _concat([part for name in step.keys for part in regions[name]])
                    part = self._kernel(queries[step.queries], k, v, causal=step.causal, scale=scale)
                    merged[step.queries].add(*part)

        self._on_layer(layer)
        if self._chunk is not None:
            return q_BHSD.transpose(1, 2)
        outs = [merged[name].finish(q_BHSD.dtype)[0] for name in ("anchor", "block") if queries[name].shape[2]]
        out_BHSD = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        return out_BHSD.transpose(1, 2)

    def _select(
        self,
        step: Select,
        layer: int,
        q_BHSD: Tensor,
        block: LayerKV,
        scale: float,
        projections: Projections | None,
    ) -> Tensor:
        """Return the kept rows, K and V in one tensor (2, B, K, R, D), so that they travel as one message."""
        assert self._compressor is not None
        a, at = self.host.anchor_len, self._question
        question_q = None
        if self._compressor.needs_question:
            assert at is not None
            question_q = self._rotate(q_BHSD[:, :, at.start : at.start + at.length], at.delta, layer)
        if projections is not None:
            projections = Projections(*(x[:, a:] for x in (projections.q_BSE, projections.k_BSE, projections.v_BSE)))
        scores_BKL = self._compressor.score(
            Candidates(
                layer=layer,
                rank=self.host.rank,
                q_BHSD=q_BHSD[:, :, a:],
                k_BKSD=block.k_BKTD,
                v_BKSD=block.v_BKTD,
                scale=scale,
                question_q_BHQD=question_q,
                projections=projections,
                start=self.host.start,
                end=self.plan.lengths.context,
                rotate=lambda x_BHSD, delta: self._rotate(x_BHSD, delta, layer),
            )
        )
        index_BKR = top_rows(scores_BKL, step.rows, step.skip)
        index_BKRD = index_BKR[..., None].expand(*index_BKR.shape, block.k_BKTD.shape[-1])
        return torch.stack([block.k_BKTD.gather(2, index_BKRD), block.v_BKTD.gather(2, index_BKRD)])

    def _pass(self, step: Pass, layer: int, own: Tensor | None, block: LayerKV) -> tuple[Handle, list[Tensor]]:
        """Post the passing of one layer; returns the handle and the buffers of all earlier hosts, in host order."""
        t, rows, k = self._transport, self.plan.kept_rows, block.k_BKTD
        shapes = [(2, k.shape[0], k.shape[1], n, k.shape[3]) for n in rows]
        if own is None:
            own = k.new_empty(shapes[t.rank])
        name = f"layer {layer}: passing"
        if step.route == "allgather":
            gathered = t.all_gather(own, shapes, kind="passing", step=name)
            return gathered.handle, gathered.parts[: t.rank]
        buffers = [k.new_empty(shapes[h]) for h in range(t.rank)]
        handle = t.relay(
            own,
            buffers[::-1],  # the nearest host's block comes first, the others follow as they are forwarded
            src=t.rank - 1 if t.rank else None,
            dst=t.rank + 1 if t.rank < t.world - 1 else None,
            kind="passing",
            step=name,
        )
        return handle, buffers


def _concat(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([k for k, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2)
