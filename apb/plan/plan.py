"""The plan of a prefill: who holds what, what is computed, sent and kept, as plain data.

The engine, the memory check before loading, the emulator, the simulator and the tests all read the same plan; the byte
ledger of the transports is the other side of the books.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from apb.plan.memory import NOTHING, Answer, memory
from apb.plan.steps import Attend, AttendAll, GatherAnchor, Route, Select, Step

if TYPE_CHECKING:
    from apb.plan.draft import Handoff
    from apb.plan.exact import Spread

TOKEN_BYTES = 8  # one int64 per decided token, broadcast to every host
AGREE_BYTES = 32  # one SHA-256 per agreement, to every peer
ROWS_BYTES = 8  # one int64 per block and layer where hosts tell how many rows they pass on


@dataclass(frozen=True)
class ModelShape:
    """What the costs depend on. Bytes per element are those of the activations; ``linear_params`` is what one token
    multiplies with outside embedding and head (for a mixture of experts: the experts it visits)."""

    layers: int
    hidden: int
    intermediate: int  # widest projection per token (all visited experts together)
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    linear_params: int
    head_params: int  # the LM head
    total_params: int
    element_size: int  # bytes
    max_positions: int

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.element_size

    @property
    def partial_row_bytes(self) -> int:
        """Bytes of one token's partial attention output and LSE (fp32; fp64 for fp64 models) in one layer."""
        return self.q_heads * (self.head_dim * self.element_size + max(4, self.element_size))


@dataclass(frozen=True)
class PromptLengths:
    """Token counts of a prompt. ``context`` = template head + document; ``query`` = what runs in the query phase."""

    context: int  # n: prefilled over the hosts
    head: int  # s: leading context tokens before the document's own text (BOS, system prompt)
    question: int  # l_q: the question's own text, embedded in anchors; 0 when there is none
    query: int  # separator + question + template tail; 0 when there is no question
    copied: int = 0  # of the context: the question's copy behind the head, separator included; anchors then embed none


@dataclass(frozen=True)
class HostPlan:
    """One host's part: what it holds, the anchor tokens it runs beside that, and the steps of every layer in order."""

    rank: int
    spans: tuple[tuple[int, int], ...]  # context positions [start, stop) that this host holds, ascending
    anchor_len: int  # anchor tokens run beside them, dropped afterwards; unseen by block 0
    steps: tuple[Step, ...]
    anchor_start: int = 0  # position of the first of them: the anchor's tokens before it are other hosts' share

    @property
    def start(self) -> int:
        """The first position held."""
        return self.spans[0][0]

    @property
    def stop(self) -> int:
        """The position after the last one held."""
        return self.spans[-1][1]

    @property
    def block_len(self) -> int:
        """Tokens whose KV stays on this host."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def tokens_run(self) -> int:
        """Tokens that go through the linear layers here."""
        return self.block_len + self.anchor_len

    @property
    def kept_rows(self) -> int:
        """Rows that this host selects and passes on, from all it holds."""
        return sum(step.rows for step in self.steps if isinstance(step, Select))

    @property
    def alone(self) -> bool:
        """Whether the block sees nothing but itself and no layer waits for other hosts."""
        sees_itself = all(isinstance(s, Attend) and s.keys == ("block",) for s in self.steps)
        return sees_itself and not self.anchor_len and len(self.spans) == 1

    def head_pairs(self, q_heads: int) -> int:
        """Query-key pairs computed in one layer, each head by itself."""
        shared = sum(step.pairs for step in self.steps if isinstance(step, Attend))
        return shared * q_heads + sum(step.head_pairs for step in self.steps if isinstance(step, AttendAll))


@dataclass(frozen=True)
class PrefillPlan:
    """A whole prefill as data. Lengths in tokens, sizes in bytes, work in floating-point operations."""

    strategy: str
    compressor: str | None
    shape: ModelShape
    lengths: PromptLengths
    anchor_len: int  # l_a on hosts that have a visible anchor
    anchor_skip: int  # s as used: context tokens that stand before the question
    question_len: int  # l_q in the anchor, embedded or the context's own copy; 0 when it holds no question
    route: Route
    kept_rows: tuple[int, ...]  # rows that each block passes on; blocks are numbered in position order
    exact: bool
    host_plans: tuple[HostPlan, ...]
    spread: Spread | None = None  # how exact attention reaches over all hosts
    fused: bool = False  # whether the question runs in the blocks' own pass; in chunks it has a pass of its own
    chunk_tokens: int | None = None  # tokens that a host runs through a layer at once; None: all of its own
    draft: Handoff | None = None  # what a draft head takes over; None without one

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len(self.host_plans)

    @cached_property
    def digest(self) -> str:
        """Hash of the plan, which all hosts compare before their first send."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @cached_property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Where the context lies: (host, tokens) of every block in position order."""
        held = sorted((start, stop, h.rank) for h in self.host_plans for start, stop in h.spans)
        return tuple((rank, stop - start) for start, stop, rank in held)

    @cached_property
    def numbers(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the blocks that each host holds, ascending."""
        held: list[list[int]] = [[] for _ in range(self.hosts)]
        for number, (rank, _) in enumerate(self.blocks):
            held[rank].append(number)
        return tuple(tuple(numbers) for numbers in held)

    @cached_property
    def shared_anchor(self) -> GatherAnchor | None:
        """How the anchor is shared; None when every host that sees one runs all of it."""
        return next((step for step in self.host_plans[-1].steps if isinstance(step, GatherAnchor)), None)

    @cached_property
    def coverage(self) -> float | None:
        """Share of the scores that is enough to pass on; None: always ``kept_rows``.

        Otherwise these rows, and the bytes and FLOPs that follow from them, are upper bounds, and hosts tell each other
        in every layer how many there are.
        """
        selects = (step for host in self.host_plans for step in host.steps if isinstance(step, Select))
        return next((step.coverage for step in selects), None)

    def question_rows(self, rank: int) -> tuple[int, int]:
        """Rows [start, stop) of the question among the anchor tokens that host ``rank`` runs."""
        host, asked = self.host_plans[rank], self.anchor_skip + self.question_len
        rows = [min(max(at - host.anchor_start, 0), host.anchor_len) for at in (self.anchor_skip, asked)]
        return rows[0], rows[1]

    def receivers(self, number: int) -> tuple[int, ...]:
        """Hosts that block ``number`` is passed to when rows go straight there: all others that hold a later block."""
        owner = self.blocks[number][0]
        return tuple(r for r, held in enumerate(self.numbers) if r != owner and held[-1] > number)

    def _receiving(self, number: int, owner: int) -> int:
        """How many ``receivers`` there are."""
        later = self.hosts - bisect.bisect_right(self._last_numbers, number)
        return later - (self.numbers[owner][-1] > number)

    @cached_property
    def _last_numbers(self) -> list[int]:
        return sorted(held[-1] for held in self.numbers)

    def passing_rows(self, rank: int) -> int:
        """Passing rows that host ``rank``'s last block attends to; those of its other blocks are among them."""
        return 0 if self.route == "none" else sum(self.kept_rows[: self.numbers[rank][-1]])

    def passing_bytes(self, rank: int) -> int:
        """Bytes host ``rank`` sends to pass blocks, all layers. Source: APB section 3.3; ring and direct ours."""
        if self.route == "ring":
            rows = sum(self.kept_rows[: rank + 1]) if rank < self.hosts - 1 else 0
        elif self.route == "allgather":
            rows = self.kept_rows[rank] * (self.hosts - 1)
        elif self.route == "direct":
            rows = sum(self.kept_rows[number] * self._receiving(number, rank) for number in self.numbers[rank])
        else:
            rows = 0
        return rows * self.shape.kv_row_bytes * self.shape.layers

    def anchor_bytes(self, rank: int) -> int:
        """Bytes host ``rank`` sends to share the anchor: its K and V, and the question's queries where wanted."""
        s, shared = self.shape, self.shared_anchor
        if shared is None:
            return 0
        first, last = self.question_rows(rank)
        queries = (last - first) * s.q_heads * s.head_dim * s.element_size if shared.question else 0
        own = self.host_plans[rank].anchor_len * s.kv_row_bytes + queries
        return own * (self.hosts - 1) * s.layers

    def prefill_bytes(self, rank: int) -> dict[str, int]:
        """Bytes host ``rank`` sends while the context is prefilled, by kind, all layers."""
        if self.spread is not None:
            kinds = {kind: count * self.shape.layers for kind, count in self.spread.sent(rank, self.shape).items()}
        else:
            told = ROWS_BYTES * len(self.numbers[rank]) * (self.hosts - 1) * self.shape.layers if self.coverage else 0
            kinds = {"anchor": self.anchor_bytes(rank), "rows": told, "passing": self.passing_bytes(rank)}
        if self.draft is not None and rank != self.hosts - 1:
            kinds["draft"] = self.draft.sent(self.host_plans[rank].spans, self.lengths.context)
        return kinds

    def partial_bytes(self, tokens: int) -> int:
        """Bytes each host sends to merge the attention of ``tokens`` query or decoded tokens, all layers."""
        return (self.hosts - 1) * tokens * self.shape.partial_row_bytes * self.shape.layers

    def bytes_by_kind(self, query_tokens: int, decided: int = 0, forwarded: int = 0) -> dict[str, int]:
        """Bytes all hosts send together: prefill, ``query_tokens`` in the query phase, then ``decided`` tokens of which
        ``forwarded`` went through the model again."""
        peers = self.hosts - 1
        kinds = Counter(
            {
                "agree": AGREE_BYTES * self.hosts * peers,
                "partials": self.hosts * self.partial_bytes(query_tokens + forwarded),
                "token": TOKEN_BYTES * decided * peers,
            }
        )
        for rank in range(self.hosts):
            kinds.update(self.prefill_bytes(rank))
        return {kind: count for kind, count in kinds.items() if count}

    def prefill_flops(self, rank: int) -> int:
        """FLOPs of host ``rank`` for the context: linear layers and attention, anchors counted, scoring not."""
        host = self.host_plans[rank]
        return self._flops(host.tokens_run, host.head_pairs(self.shape.q_heads))

    def query_flops(self, rank: int) -> int:
        """FLOPs of host ``rank`` for the query phase, which runs on every host."""
        m = self.lengths.query
        owner = rank == self.hosts - 1
        pairs = m * self.host_plans[rank].block_len + (m * (m + 1) // 2 if owner else 0)
        return self._flops(m, pairs * self.shape.q_heads) + (2 * self.shape.head_params if owner else 0)

    def _flops(self, tokens: int, head_pairs: int) -> int:
        s = self.shape
        return 2 * s.linear_params * tokens + 4 * s.head_dim * s.layers * head_pairs

    def memory(self, rank: int, answer: Answer = NOTHING) -> dict[str, int]:
        """Bytes host ``rank`` needs for the prefill and an answer: weights, KV, and what else lives at once."""
        return memory(self, rank, answer)

    def rows(self, answer: Answer = NOTHING) -> Iterator[dict[str, Any]]:
        """One dictionary a host, for tables and JSON."""
        for r, host in enumerate(self.host_plans):
            memory = self.memory(r, answer)
            yield {
                "host": r,
                "start": host.start,
                "stop": host.stop,
                "spans": [list(span) for span in host.spans],
                "block_tokens": host.block_len,
                "anchor_tokens": host.anchor_len,
                "passing_rows": self.passing_rows(r),
                "kept_rows": host.kept_rows,
                "prefill_flops": self.prefill_flops(r),
                "query_flops": self.query_flops(r),
                "passing_bytes": sum(self.prefill_bytes(r).values()),
                "query_bytes": self.partial_bytes(self.lengths.query),
                "memory_bytes": sum(memory.values()),
                "memory": memory,
            }

    def to_dict(self, answer: Answer = NOTHING) -> dict[str, Any]:
        """The plan as the JSON document shows it."""
        return {
            "strategy": self.strategy,
            "compressor": self.compressor,
            "hosts": self.hosts,
            "exact": self.exact,
            "chunk_tokens": self.chunk_tokens,
            "lengths": asdict(self.lengths),
            "anchor_len": self.anchor_len,
            "passing_len": max(self.kept_rows),
            "passing": self.route,
            "passing_coverage": self.coverage,
            "bytes_by_kind": self.bytes_by_kind(self.lengths.query),
            "prefill_flops": [self.prefill_flops(r) for r in range(self.hosts)],
            "per_host": list(self.rows(answer)),
        }
