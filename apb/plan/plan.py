"""The plan of a prefill: who holds what, what is computed, sent and kept, as plain data.

The engine, the memory check before loading, the emulator, the simulator and the tests all read the same plan; the byte
ledger of the transports is the other side of the books.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from apb.layers.sharding import Segment, Sharding
from apb.plan.draft import Handoff
from apb.plan.exact import Spread
from apb.plan.shapes import ModelShape, PromptLengths
from apb.plan.steps import Attend, GatherAnchor, Route, Select, Step


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
        """True where the block sees nothing but itself in sharded layers, which then wait for no other host."""
        sees_itself = all(isinstance(s, Attend) and s.keys == ("block",) for s in self.steps)
        return sees_itself and not self.anchor_len and len(self.spans) == 1

    @property
    def pairs(self) -> int:
        """Query-key pairs that the steps compute in one sharded layer."""
        return sum(step.pairs for step in self.steps if isinstance(step, Attend))


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
    rope_length: int | None = None  # tokens, answer included, that RoPE is told of; None where it does not depend on it

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len(self.host_plans)

    @cached_property
    def context(self) -> Sharding:
        """Shards of the context."""
        return Sharding(tuple(host.spans for host in self.host_plans))

    def anchor(self, rank: int) -> Sharding:
        """Shards of the anchor that host ``rank`` runs: a sequence of its own.

        All hosts together where it is shared; where every host runs all it sees, nobody but that host.
        """
        runs = [(h.anchor_start, h.anchor_start + h.anchor_len) for h in self.host_plans]
        mine = [r for r in range(self.hosts) if runs[r][0] < runs[r][1] and (self.shared_anchor or r == rank)]
        return Sharding(tuple((runs[r],) if r in mine else () for r in range(self.hosts)))

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The sequences among the tokens that host ``rank`` runs: the anchor, and the context."""
        host = self.host_plans[rank]
        anchor = (Segment(0, host.anchor_len, self.anchor(rank), kept=False),) if self.anchor_len else ()
        return (*anchor, Segment(host.anchor_len, host.tokens_run, self.context, kept=True))

    def alone(self, rank: int) -> bool:
        """True where host ``rank``'s block sees nothing but itself in any layer."""
        return self.host_plans[rank].alone and all(kind.sharded for kind in self.shape.kinds)

    @cached_property
    def digest(self) -> str:
        """Hash of the plan, which all hosts compare before their first send."""
        kinds = [kind.name for kind in self.shape.mixers]  # equal sizes may be those of unlike kinds
        return hashlib.sha256(json.dumps([asdict(self), kinds], sort_keys=True).encode()).hexdigest()

    @cached_property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The owner of every block, in position order: (host, tokens)."""
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
        """The sharing of the anchor; None when every host that sees one runs all of it."""
        return next((step for step in self.host_plans[-1].steps if isinstance(step, GatherAnchor)), None)

    def question_rows(self, rank: int) -> tuple[int, int]:
        """Rows [start, stop) of the question among the anchor tokens that host ``rank`` runs."""
        host, asked = self.host_plans[rank], self.anchor_skip + self.question_len
        rows = [min(max(at - host.anchor_start, 0), host.anchor_len) for at in (self.anchor_skip, asked)]
        return rows[0], rows[1]

    def receivers(self, number: int) -> tuple[int, ...]:
        """Hosts that block ``number`` is passed to when rows go straight there: all others that hold a later block."""
        owner = self.blocks[number][0]
        return tuple(r for r, held in enumerate(self.numbers) if r != owner and held[-1] > number)

    @cached_property
    def last_numbers(self) -> list[int]:
        """The numbers of the hosts' last blocks, ascending."""
        return sorted(held[-1] for held in self.numbers)

    def passing_rows(self, rank: int) -> int:
        """Passing rows that host ``rank``'s last block attends to; those of its other blocks are among them."""
        return 0 if self.route == "none" else sum(self.kept_rows[: self.numbers[rank][-1]])
