"""What one host does in every layer of a prefill, step by step, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    def head_pairs(self, q_heads: int) -> int:
        """Query-key pairs computed in one layer, each head by itself."""
        shared = sum(step.pairs for step in self.steps if isinstance(step, Attend))
        return shared * q_heads + sum(step.head_pairs for step in self.steps if isinstance(step, AttendAll))
