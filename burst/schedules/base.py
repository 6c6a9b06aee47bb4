"""Schedules as data: every rank's steps in program order, and everything that they were made for."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from burst.layouts.layout import Layout
from burst.layouts.masks import MaskPiece
from burst.schedules.payload import AttentionShape, Heads, Role
from burst.schedules.steps import BORDER, Compute, Parcel, Phase, Post, ScheduleStep, Slot


@dataclass(frozen=True)
class Schedule:
    """Every rank's program for one phase of one call. ``programs[rank]`` is in program order.

    All other fields say what the programs were made for. ``shape``'s heads and dims are binding. Its batch and
    element sizes only weighed choices. ``layout`` has the caller's tokens by rank; ``blocks`` and ``key_blocks``
    are the layouts that Compute's q_block and kv_block index (the caller's own, except in head groups).
    ``heads[m]`` are the heads of a group's member m, empty when nothing is dealt by heads; rank r is member
    ``r % len(heads)`` of the group ``r // len(heads)``.
    """

    name: str
    phase: Phase
    travels: str  # role of the traveller: kv | q | qd
    shape: AttentionShape
    layout: Layout
    blocks: Layout
    key_blocks: Layout
    nodes: tuple[int, ...]  # machine of each rank
    causal: bool
    window: int | None
    programs: tuple[tuple[ScheduleStep, ...], ...]
    heads: tuple[Heads, ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.programs)

    @property
    def members(self) -> int:
        """Ranks that share their tokens by heads; 1 when there are no head groups."""
        return max(1, len(self.heads))

    def block_of(self, rank: int) -> int:
        """The block that a rank's own slots hold once heads have been dealt."""
        return rank // self.members

    def heads_of(self, rank: int) -> Heads | None:
        """The heads that a rank works on; None: all."""
        return self.heads[rank % self.members] if self.heads else None

    def pieces(self, q_block: int, kv_block: int) -> tuple[MaskPiece, ...]:
        """The mask of a Compute, in rows of the two blocks."""
        found = self._masks.get((q_block, kv_block))
        if found is None:
            found = self._masks[q_block, kv_block] = self.blocks.pieces(
                q_block, kv_block, causal=self.causal, window=self.window, keys=self.key_blocks
            )
        return found

    def places(self, rank: int, device: torch.device) -> tuple[Tensor, ...]:
        """Rows of each member of a rank's head group in the group's local order, int64 (S,).

        Kept on the device: a layer that moved them there would wait for it.
        """
        first = rank - rank % self.members
        found = self._places.get((first, device))
        if found is None:
            block = self.block_of(rank)
            group = range(first, first + self.members)
            rows = (self.blocks.rows(block, self.layout.positions(member)) for member in group)
            found = self._places[first, device] = tuple(x.to(device) for x in rows)
        return found

    @cached_property
    def _places(self) -> dict[tuple[int, torch.device], tuple[Tensor, ...]]:
        return {}

    @cached_property
    def _masks(self) -> dict[tuple[int, int], tuple[MaskPiece, ...]]:
        return {}

    def rows(self, role: Role, block: int) -> int:
        """Rows of one block of a role (for qkv, dout, out, dqkv the block is a rank)."""
        if role in BORDER:
            return self.layout.counts[block]
        return (self.key_blocks if role in ("kv", "dkv") else self.blocks).counts[block]

    def parcel_bytes(self, rank: int, parcel: Parcel, shape: AttentionShape) -> int:
        """Bytes of one message that ``rank`` sends or receives."""
        heads = self.heads_of(rank) if parcel.heads is None else self.heads[parcel.heads]
        return self.rows(parcel.slot.role, parcel.block) * shape.row_bytes(parcel.slot.role, heads)

    def bytes_sent(self, rank: int, shape: AttentionShape) -> dict[tuple[str, str], int]:
        """Bytes that ``rank`` sends, by role and link class (``intra`` or ``inter``), as in the ledger."""
        total: Counter[tuple[str, str]] = Counter()
        for parcel in self.sends(rank):
            link = "intra" if self.nodes[parcel.peer] == self.nodes[rank] else "inter"
            total[parcel.slot.role, link] += self.parcel_bytes(rank, parcel, shape)
        return dict(total)

    def sends(self, rank: int) -> list[Parcel]:
        """All messages that ``rank`` sends, in order; its length is the message count."""
        return [p for step in self.programs[rank] if isinstance(step, Post) for p in step.sends]

    def slot_blocks(self, rank: int) -> dict[Slot, tuple[int, ...]]:
        """The blocks that each workspace slot (index 1..) of ``rank`` holds at some time, for allocation."""
        found: dict[Slot, set[int]] = {}
        for step in self.programs[rank]:
            if isinstance(step, Post):
                for parcel in step.recvs:
                    found.setdefault(parcel.slot, set()).add(parcel.block)
            elif isinstance(step, Compute):
                for slot in step.results:
                    block = step.kv_block if slot.role == "dkv" else step.q_block
                    found.setdefault(slot, set()).add(block)
        return {slot: tuple(sorted(blocks)) for slot, blocks in found.items() if slot.index}

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """Names of all channels, in the order in which every rank warms up their communicators."""
        posts = (s for program in self.programs for s in program if isinstance(s, Post))
        return tuple(sorted({post.channel for post in posts}))

    @cached_property
    def digest(self) -> str:
        """Hash of all fields, which all ranks compare before their first send."""
        return hashlib.sha256(repr(self).encode()).hexdigest()
