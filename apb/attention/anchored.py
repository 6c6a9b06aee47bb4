"""Runs one host's steps of a prefill plan, layer by layer: selection, passing, attention, and the KV that is kept.

Shapes: B batch (1), S tokens run here (anchor, then blocks), L block tokens, R passed rows, H query heads, K kv heads,
D head dim, Q question tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attention.base import Prefill
from apb.attention.cached import CacheAttention
from apb.attention.chunked import attend_over, attend_to
from apb.attention.selection import Selection
from apb.compress.base import Compressor
from apb.layers.base import LayerKind, Place, ShardedCache
from apb.layers.call import AttentionCall, Call
from apb.layers.partials import finish
from apb.layers.rows import LayerKV, side_by_side
from apb.plan.plan import PrefillPlan
from apb.plan.steps import Attend, GatherAnchor, Pass, Region, Select, Step, WaitAnchor, WaitPassing
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator
from burst.transport import Gathered, Handle, Message, Transport


@dataclass
class _LayerState:
    """State of one layer while its steps run; lists are by the host's own blocks."""

    call: AttentionCall
    rows: list[slice]  # where each block stands in S
    blocks: list[LayerKV]
    share: LayerKV  # the anchor's rows that this host runs
    anchor: list[LayerKV]  # all of the anchor, in parts by the hosts that ran them
    question: list[Tensor]  # the embedded question's queries (B, H, Q, D), in parts
    passed: dict[int, Tensor]  # selected rows (B, K, R, D + E) by the number of the block they come from


class PrefillAttention(Prefill):
    """Stands in for a model's attention during a prefill; executes the host's plan and keeps its blocks' KV."""

    def __init__(
        self,
        plan: PrefillPlan,
        transport: Transport,
        kernel: Kernel,
        compressor: Compressor | None,
        question_delta: int | None,
        rotate: Callable[[Tensor, int | Tensor, int], Tensor],
        on_layer: Callable[[int], None],
    ) -> None:
        """``question_delta``: positions between the anchor's copy of the question and the question itself."""
        super().__init__(plan, Place(transport, kernel), on_layer)
        self.plan = plan
        self.host = plan.host_plans[transport.rank]
        self.needs_projections = compressor is not None and compressor.needs_projections
        chunk = plan.chunk_tokens
        self._chunk = chunk if chunk is not None and chunk < self.host.tokens_run else None
        self._select = Selection(plan, transport.rank, compressor, question_delta, rotate)
        self._numbers = plan.numbers[transport.rank]
        self._due = _due(self.host.steps) if self._chunk is not None else {}

    def _attend(self, call: AttentionCall, kind: LayerKind, cache: ShardedCache) -> Tensor:
        """Execute the steps of one layer."""
        a, rows = self.host.anchor_len, LayerKV(call.k_BKSD, call.v_BKSE)
        # Copies, so that the kept KV does not hold the anchor's rows in memory.
        kept = rows.rows(a, len(rows)).clone()
        cache.fill(kept)
        share = rows.rows(0, a)
        sizes = [stop - start for start, stop in self.host.spans]
        ends = list(itertools.accumulate(sizes, initial=0))
        blocks = kind.blocks(call, self._kernel)
        here = _LayerState(
            call=call,
            rows=[slice(a + start, a + stop) for start, stop in itertools.pairwise(ends)],
            blocks=[kept.rows(start, stop) for start, stop in itertools.pairwise(ends)],
            share=share,
            anchor=[share],
            question=[call.q_BHSD[:, :, slice(*self.plan.question_rows(self.host.rank))]],
            passed={},
        )
        merged = {("anchor", 0): Accumulator()} | {("block", i): Accumulator() for i in range(len(sizes))}
        gathering: Gathered | None = None
        arriving: dict[int, Handle] = {}
        in_place = call.q_BHSD.shape[3] == call.value_dim  # in chunks, outputs take their queries' memory
        out_BHSE = call.q_BHSD if in_place or self._chunk is None else call.blank().transpose(1, 2)

        for at, step in enumerate(self.host.steps):
            match step:
                case GatherAnchor():
                    gathering = self._gather_anchor(step, here)
                case WaitAnchor():
                    assert gathering is not None
                    self._take_anchor(gathering.wait(), here)
                case Select():
                    own, block = here.rows[step.block], here.blocks[step.block]
                    with self._transport.during("selection"):
                        chosen = self._select(step, call.rows(own.start, own.stop), block, here.question)
                    here.passed[self._numbers[step.block]] = chosen
                case Pass():
                    arriving[step.block] = self._pass(step, here)
                case WaitPassing():
                    arriving[step.block].wait()
                case Attend() if self._chunk is None:
                    kv, total = side_by_side(self._keys_of(step, here)), merged[step.queries, step.block]
                    attend_to(total, call.q_BHSD[:, :, self._queries(step, here)], kv, blocks, step.causal)
            for attends in self._due.get(at, ()):
                assert self._chunk is not None
                keys = [(side_by_side(self._keys_of(attend, here)), attend.causal) for attend in attends]
                own = self._queries(attends[0], here)
                attend_over(out_BHSE[:, :, own], call.q_BHSD[:, :, own], keys, blocks, self._chunk, call.sinks_H)

        if self._chunk is not None:
            return out_BHSE.transpose(1, 2)
        outs = [finish(done, call.q_BHSD.dtype, call.sinks_H) for done in merged.values() if done.ready]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _queries(self, step: Attend, here: _LayerState) -> slice:
        return slice(0, self.host.anchor_len) if step.queries == "anchor" else here.rows[step.block]

    def _keys_of(self, step: Attend, here: _LayerState) -> list[LayerKV]:
        return [part for name in step.keys for part in self._keys(name, step.block, here)]

    def _keys(self, region: Region, block: int, here: _LayerState) -> list[LayerKV]:
        """Return a region's keys and values in parts: they are laid side by side only where they are attended to."""
        match region:
            case "anchor":
                return here.anchor
            case "share":
                return [here.share]
            case "before":
                return here.anchor[: self.host.rank]
            case "block":
                return [here.blocks[block]]
            case "passing":
                earlier = sorted(number for number in here.passed if number < self._numbers[block])
                wide = here.share.k_BKTD.shape[3]
                return [_split(here.passed[number], wide) for number in earlier]

    # -- the anchor -----------------------------------------------------------------------------------------------

    def _gather_anchor(self, step: GatherAnchor, here: _LayerState) -> Gathered:
        """Post this host's share of the anchor, and the question's queries in it, as one flat message."""
        own = [here.share.k_BKTD, here.share.v_BKTE, *(here.question if step.question else [])]
        packed = torch.cat([x.flatten() for x in own])
        shapes = [(sum(self._share_sizes(rank, step.question, here)),) for rank in range(self.plan.hosts)]
        return self._transport.all_gather(packed, shapes, kind="anchor", step=f"layer {here.call.layer}: anchor")

    def _share_sizes(self, rank: int, question: bool, here: _LayerState) -> list[int]:
        """Return how many numbers of K, V and queries a host's share has."""
        _, heads, _, width = here.call.q_BHSD.shape
        rows, block = self.plan.host_plans[rank].anchor_len, here.blocks[0]
        kv = [rows * x.shape[1] * x.shape[3] for x in (block.k_BKTD, block.v_BKTE)]
        first, last = self.plan.question_rows(rank)
        return [*kv, *([(last - first) * heads * width] if question else [])]

    def _take_anchor(self, parts: list[Tensor], here: _LayerState) -> None:
        """Unpack all hosts' shares."""
        batch, heads, _, width = here.call.q_BHSD.shape
        shared = self.plan.shared_anchor
        assert shared is not None
        here.anchor, here.question = [], []
        for rank, part in enumerate(parts):
            k, v, *asked = part.split(self._share_sizes(rank, shared.question, here))
            rows, own = self.plan.host_plans[rank].anchor_len, (here.share.k_BKTD, here.share.v_BKTE)
            sizes = [(batch, x.shape[1], rows, x.shape[3]) for x in own]
            here.anchor.append(LayerKV(k.view(sizes[0]), v.view(sizes[1])))
            first, last = self.plan.question_rows(rank)
            here.question += [q.view(batch, heads, last - first, width) for q in asked]

    # -- passing --------------------------------------------------------------------------------------------------

    def _pass(self, step: Pass, here: _LayerState) -> Handle:
        """Post the passing of one block; ``here.passed`` gets the buffers of what is received with it."""
        t, plan, block = self._transport, self.plan, here.blocks[step.block]
        k, wide = block.k_BKTD, block.k_BKTD.shape[3] + block.v_BKTE.shape[3]
        shapes = [(k.shape[0], k.shape[1], rows, wide) for rows in plan.kept_rows]
        number = self._numbers[step.block]
        own = here.passed.get(number)
        if own is None:
            own = k.new_empty(shapes[number])
        name = f"layer {here.call.layer}: passing" + (f" {step.block}" if step.route == "direct" else "")
        if step.route == "direct":
            sources = [n[step.block] for n in plan.numbers if len(n) > step.block]
            buffers = {n: k.new_empty(shapes[n]) for n in sources if t.rank in plan.receivers(n)}
            here.passed |= buffers
            sends = [Message(rank, own) for rank in plan.receivers(number)]
            recvs = [Message(plan.blocks[n][0], buffer) for n, buffer in buffers.items()]
            return t.exchange(sends, recvs, kind="passing", step=name)
        if step.route == "allgather":
            gathered = t.all_gather(own, shapes, kind="passing", step=name)
            here.passed |= dict(enumerate(gathered.parts))
            return gathered.handle
        here.passed |= {n: k.new_empty(shapes[n]) for n in range(t.rank)}
        return t.relay(
            own,
            [here.passed[n] for n in reversed(range(t.rank))],  # the nearest host's block comes first
            src=t.rank - 1 if t.rank else None,
            dst=t.rank + 1 if t.rank < t.world - 1 else None,
            kind="passing",
            step=name,
        )


class WithQuestion:
    """Stands in for a model's attention where the question runs in its host's own pass, behind anchor and blocks.

    In every layer the question's rows attend to what that layer's prefill has just kept, on all hosts, as in a pass of
    their own: the same result, with the weights read once. Source: Spava (arXiv 2601.21444), section 3.
    """

    def __init__(self, prefill: PrefillAttention, question: CacheAttention, tokens: int) -> None:
        """``tokens``: rows of anchor and blocks; those behind them are the question's."""
        self.needs_projections = prefill.needs_projections
        self._prefill, self._question, self._tokens = prefill, question, tokens

    def __call__(self, call: Call) -> Tensor:
        """Return the output of all rows."""
        n = self._tokens
        out = self._prefill(call.rows(0, n))
        return call.join([out, self._question(call.rows(n, call.tokens))])


def _due(steps: Sequence[Step]) -> dict[int, list[list[Attend]]]:
    """Return what is attended to in chunks after which step: all calls of the same queries together.

    Outputs take the queries' memory. So all that these queries attend to must be here, and nothing may be selected
    by them afterwards.
    """
    sent = max((at for at, step in enumerate(steps) if isinstance(step, Select | Pass)), default=0)
    calls: dict[tuple[str, int], list[Attend]] = {}
    last: dict[tuple[str, int], int] = {}
    for at, step in enumerate(steps):
        if isinstance(step, Attend):
            calls.setdefault((step.queries, step.block), []).append(step)
            last[step.queries, step.block] = max(at, sent)
    return {at: [calls[whose] for whose in last if last[whose] == at] for at in sorted(set(last.values()))}


def _split(rows_BKRX: Tensor, wide: int) -> LayerKV:
    """Return rows of keys, ``wide`` numbers each, and values that travelled side by side."""
    return LayerKV(rows_BKRX[..., :wide], rows_BKRX[..., wide:])
