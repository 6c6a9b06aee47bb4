"""The steps of a layer as data: what a host selects, sends, waits for and computes, in the order of its plan.

A host may hold several blocks; ``block`` is the place of one of them among the host's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Where keys come from: the whole anchor, this host's share of it, what stands before that share; a block; the rows that
# all earlier blocks passed on.
Region = Literal["anchor", "before", "share", "block", "passing"]
# "ring" forwards every hop on arrival; "allgather" sends to all; "direct" to the hosts that hold a later block.
Route = Literal["ring", "allgather", "direct", "none"]


@dataclass(frozen=True)
class Select:
    """Keep ``rows`` of the block's keys and values per kv head, none from the first ``skip`` block tokens."""

    rows: int
    skip: int
    block: int = 0


@dataclass(frozen=True)
class Pass:
    """Start passing the selected rows of this block, and receiving those of the other hosts' blocks in that place."""

    route: Route
    block: int = 0


@dataclass(frozen=True)
class WaitPassing:
    """Wait until what was received with this block's passing is here: then all earlier blocks' rows are."""

    block: int = 0


@dataclass(frozen=True)
class GatherAnchor:
    """Start giving every host every host's share of the anchor's keys and values, and of the question's queries in it
    when a compressor wants them (``question``)."""

    question: bool


@dataclass(frozen=True)
class WaitAnchor:
    """Wait until the whole anchor is here."""


@dataclass(frozen=True)
class Attend:
    """One kernel call: ``queries`` attend to ``keys`` (concatenated); ``pairs`` counts query-key pairs computed."""

    queries: Literal["anchor", "block"]  # the anchor's rows that this host runs, or a block
    keys: tuple[Region, ...]
    causal: bool
    pairs: int
    block: int = 0


@dataclass(frozen=True)
class AttendAll:
    """Attend exactly to all earlier positions, wherever they are, by the plan's ``spread``."""


Step = Select | Pass | WaitPassing | GatherAnchor | WaitAnchor | Attend | AttendAll
