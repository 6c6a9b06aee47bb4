"""The plan of a prefill: who holds what, what is computed, sent and kept, as plain data.

The engine, the memory check before loading, the emulator, the simulator and the tests all read the same plan; the byte
ledger of the transports is the other side of the books.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from burst.errors import UserError

if TYPE_CHECKING:
    from apb.spread import Spread

TOKEN_BYTES = 8  # one int64 per decided token, broadcast to every host
AGREE_BYTES = 32  # one SHA-256 per agreement, to every peer


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


Region = Literal["anchor", "block", "passing"]


@dataclass(frozen=True)
class Select:
    """Keep ``rows`` of the block's keys and values per kv head, none from the first ``skip`` block tokens."""

    rows: int
    skip: int


@dataclass(frozen=True)
class Pass:
    """Start passing the selected rows: round the ring (every hop forwarded on arrival) or by all-gather."""

    route: Literal["ring", "allgather"]


@dataclass(frozen=True)
class WaitPassing:
    """Wait until the passing blocks of all earlier hosts are here."""


@dataclass(frozen=True)
class Attend:
    """One kernel call: ``queries`` attend to ``keys`` (concatenated); ``pairs`` counts query-key pairs computed."""

    queries: Literal["anchor", "block"]
    keys: tuple[Region, ...]
    causal: bool
    pairs: int


@dataclass(frozen=True)
class AttendAll:
    """Attend exactly to all earlier positions, wherever they are, by the plan's ``spread``.

    ``head_pairs`` counts the query-key pairs computed here, each head by itself.
    """

    head_pairs: int


Step = Select | Pass | WaitPassing | Attend | AttendAll


@dataclass(frozen=True)
class HostPlan:
    """One host's part: its block, the anchor it runs beside it, and the steps of every layer in order."""

    rank: int
    spans: tuple[tuple[int, int], ...]  # context positions [start, stop) of this host's block, ascending
    anchor_len: int  # tokens run beside the block at positions 0.., dropped afterwards; unseen by host 0's block
    steps: tuple[Step, ...]

    @property
    def start(self) -> int:
        """The block's first position."""
        return self.spans[0][0]

    @property
    def stop(self) -> int:
        """The position after the block's last one."""
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
    anchor_skip: int  # s as used: context tokens that stand before the embedded question
    question_len: int  # l_q as embedded; 0 when the anchor holds no question
    route: Literal["ring", "allgather", "none"]
    kept_rows: tuple[int, ...]  # p_h: rows that host h selects and passes on
    exact: bool
    host_plans: tuple[HostPlan, ...]
    spread: Spread | None = None  # how exact attention reaches over all hosts
    chunk_tokens: int | None = None  # tokens that a host runs through a layer at once; None: all of its own

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len(self.host_plans)

    @cached_property
    def digest(self) -> str:
        """Hash of the plan, which all hosts compare before their first send."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Where the context lies: (host, tokens) of every stretch in position order."""
        stretches = sorted((start, stop, h.rank) for h in self.host_plans for start, stop in h.spans)
        return tuple((rank, stop - start) for start, stop, rank in stretches)

    def passing_rows(self, rank: int) -> int:
        """Passing rows that host ``rank``'s block attends to."""
        return 0 if self.route == "none" else sum(self.kept_rows[:rank])

    def passing_bytes(self, rank: int) -> int:
        """Bytes host ``rank`` sends to pass blocks, all layers. Source: APB section 3.3; ring and all-gather."""
        if self.route == "ring":
            rows = sum(self.kept_rows[: rank + 1]) if rank < self.hosts - 1 else 0
        elif self.route == "allgather":
            rows = self.kept_rows[rank] * (self.hosts - 1)
        else:
            rows = 0
        return rows * self.shape.kv_row_bytes * self.shape.layers

    def prefill_bytes(self, rank: int) -> dict[str, int]:
        """Bytes host ``rank`` sends while the context is prefilled, by kind, all layers."""
        if self.spread is not None:
            return {kind: count * self.shape.layers for kind, count in self.spread.sent(rank, self.shape).items()}
        return {"passing": self.passing_bytes(rank)}

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

    def memory(self, rank: int, new_tokens: int = 0) -> dict[str, int]:
        """Bytes host ``rank`` needs: weights, KV (``new_tokens`` on the last host), and one layer's activations."""
        s, host = self.shape, self.host_plans[rank]
        kept = host.block_len + (self.lengths.query + new_tokens if rank == self.hosts - 1 else 0)
        together = host.tokens_run if self.chunk_tokens is None else min(self.chunk_tokens, host.tokens_run)
        tokens = max(together, self.lengths.query)
        # Per token: residual, norm and output of the hidden size; then either the MLP's gate, up and product, or
        # attention's q, k, v before and after RoPE with two fp32 partial outputs.
        attention = (3 * s.q_heads + 4 * s.kv_heads) * s.head_dim * s.element_size + 2 * s.q_heads * s.head_dim * 4
        widest = 3 * s.hidden * s.element_size + max(3 * s.intermediate * s.element_size, attention)
        passing = (self.passing_rows(rank) + host.anchor_len) * s.kv_row_bytes * 2
        if self.spread is not None:
            passing += self.spread.workspace(rank, s)
        return {
            "weights": s.total_params * s.element_size,
            "kv": kept * s.kv_row_bytes * s.layers,
            "activations": tokens * widest + passing + host.tokens_run * self.whole_row_bytes(rank),
        }

    def whole_row_bytes(self, rank: int) -> int:
        """Bytes of a token that stay through a layer where chunks of the others run: the residual stream, its rotation,
        q, k and v; the output takes q's place, but not in exact attention over hosts."""
        s, host = self.shape, self.host_plans[rank]
        if self.chunk_tokens is None or self.chunk_tokens >= host.tokens_run or host.alone:
            return 0
        out = 0 if self.spread is None else 2 * s.q_heads * s.head_dim * max(4, s.element_size)
        return (s.hidden + (2 + s.q_heads) * s.head_dim) * s.element_size + s.kv_row_bytes + out

    def rows(self, new_tokens: int = 0) -> Iterator[dict[str, Any]]:
        """One dictionary a host, for tables and JSON."""
        for r, host in enumerate(self.host_plans):
            memory = self.memory(r, new_tokens)
            yield {
                "host": r,
                "start": host.start,
                "stop": host.stop,
                "spans": [list(span) for span in host.spans],
                "block_tokens": host.block_len,
                "anchor_tokens": host.anchor_len,
                "passing_rows": self.passing_rows(r),
                "kept_rows": self.kept_rows[r],
                "prefill_flops": self.prefill_flops(r),
                "query_flops": self.query_flops(r),
                "passing_bytes": sum(self.prefill_bytes(r).values()),
                "query_bytes": self.partial_bytes(self.lengths.query),
                "memory_bytes": sum(memory.values()),
                "memory": memory,
            }

    def to_dict(self, new_tokens: int = 0) -> dict[str, Any]:
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
            "bytes_by_kind": self.bytes_by_kind(self.lengths.query),
            "prefill_flops": [self.prefill_flops(r) for r in range(self.hosts)],
            "per_host": list(self.rows(new_tokens)),
        }


def blocks(context: int, hosts: int) -> list[tuple[int, int]]:
    """Split ``context`` tokens into contiguous blocks: the first ``context % hosts`` hosts hold one token more.

    Raises UserError when there are no hosts or fewer tokens than hosts. Source: APB section 3.1; uneven split ours.
    """
    if hosts < 1:
        raise UserError(
            "a prefill needs at least one host", given=hosts, allowed="1 or more", remedy="Set cluster.hosts=1 or more."
        )
    if hosts > context:
        raise UserError(
            "more hosts than context tokens",
            given=f"{hosts} hosts for {context} tokens",
            allowed=f"1 to {context} hosts",
            remedy="Set a smaller cluster.hosts.",
        )
    size, extra = divmod(context, hosts)
    edges = [h * size + min(h, extra) for h in range(hosts + 1)]
    return list(itertools.pairwise(edges))
