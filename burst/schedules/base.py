"""A schedule as data: what every rank computes, posts and waits for, in program order, and in which buffers.

A **block** is the rows of one rank (of one head group's ranks in ``usp`` and ``ulysses``). A **slot** is a
buffer (role, index). Index 0 is the rank's own: for input roles the caller's tensors, never overwritten; for
result roles the accumulator that is the rank's answer at the end, empty before the first write. Index 1.. is
workspace, allocated by the executor for the largest block that it holds (``Schedule.slot_blocks``).

Roles and what one block of them holds (rows S of the block; heads of the rank's head group, all heads when
there is none):
    kv    keys (K, S, d) and values (K, S, dv), element type
    q     queries (H, S, d), element type
    qd    queries, dO (H, S, dv), element type; L and D (H, S), state type: the traveller of a Q-pass backward
    qo    as qd with O (H, S, dv), element type, in place of D: for kernels that take O
    part  a partial output (H, S, dv), partial type, with its L (H, S), state type: the result of pass-Q
    out   the output and L of the rank's own queries; travels (without L, element type) only back from head
          groups
    dq    gradient of queries (H, S, d); in slots 1.. and on the wire in the gradient type
    dkv   gradients of keys and values, likewise
    qkv   queries, keys, values of one head group, element type (to the head group)
    dout  dO of one head group, element type (to the head group)
    dqkv  gradients of queries, keys, values of one head group, partial type (back from the head group)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from burst.layouts.layout import Layout
from burst.layouts.masks import Piece

Role = Literal["kv", "q", "qd", "qo", "part", "out", "dq", "dkv", "qkv", "dout", "dqkv"]
Phase = Literal["forward", "backward"]
INPUTS: tuple[Role, ...] = ("kv", "q", "qd", "qo")  # roles whose slot 0 is the caller's


@dataclass(frozen=True, order=True)
class Slot:
    """A buffer of one rank."""

    role: Role
    index: int


class Parcel(NamedTuple):
    """One message on the wire: ``slot``'s content, which is ``block``, to or from ``peer``.

    ``heads`` is None for roles that hold all heads of the rank's head group; for qkv, dout, out, dqkv it says
    which head group's heads travel (index into ``Schedule.heads``), and ``block`` is then a rank: whose rows.
    """

    peer: int
    slot: Slot
    block: int
    heads: int | None = None


@dataclass(frozen=True)
class Post:
    """Start sends and receives as one exchange (one NCCL group); their buffers are taken until its ``Wait``.

    ``name`` is unique in the rank's program. Posts of one channel run in program order and need a
    communicator of their own on NCCL; the order of messages between two ranks is also the same at both ends
    across channels. ``inter`` in a channel's name says that it crosses nodes in double rings.
    """

    name: int
    channel: str
    sends: tuple[Parcel, ...]
    recvs: tuple[Parcel, ...]


@dataclass(frozen=True)
class Wait:
    """Wait until all receives of the post have arrived and all its sends may be forgotten."""

    name: int


@dataclass(frozen=True)
class Compute:
    """Attend the queries of ``q_block`` in slot ``q`` to the keys of ``kv_block`` in slot ``kv``.

    The mask is ``Schedule.pieces(q_block, kv_block)``, never empty here. Forward: ``results`` is one slot,
    ``out`` or ``part``. Backward: ``q`` has role qd or qo (own: slot 0), ``results`` are a ``dq`` and a
    ``dkv`` slot. A result slot of index 0 is added to (merged by lse for ``out``), one of index 1.. is
    overwritten: rows that no piece touches become 0 (``part``: 0 with lse -inf).
    """

    q_block: int
    kv_block: int
    q: Slot
    kv: Slot
    results: tuple[Slot, ...]


@dataclass(frozen=True)
class Fold:
    """Add ``source`` to ``target`` (``part`` into ``out``: merge by lse); both hold results of ``block``."""

    source: Slot
    target: Slot
    block: int


@dataclass(frozen=True)
class Regroup:
    """Local copies at the borders of a head group; ``slots[m]`` belongs to member m (own member: index 0).

    ``qkv`` and ``dout``: rows of all members, this rank's head group -> the rank's working tensors (q, kv;
    dO), in the local order of ``Schedule.blocks``. Own rows come from the caller's tensors, the others from
    the slots. ``out`` and ``dqkv``: this rank's rows, heads of all head groups -> the caller's results. Own
    head group's rows come from the working results, the others from the slots. Where several head groups
    share a kv head, their ``dqkv`` are summed in member order, in the accumulator type. A slot of None brings
    nothing (no rows or heads).
    """

    role: Role
    slots: tuple[Slot | None, ...]


ScheduleStep = Post | Wait | Compute | Fold | Regroup


class Heads(NamedTuple):
    """The heads that one member of a head group works on, in the caller's order; both ranges may be empty.

    ``q_count`` is a whole multiple of ``kv_count``, grouped as kernels expect. Members may share a kv head.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def q_count(self) -> int:
        """Query heads."""
        return self.q_stop - self.q_start

    @property
    def kv_count(self) -> int:
        """Key and value heads."""
        return self.kv_stop - self.kv_start


@dataclass(frozen=True)
class AttentionShape:
    """What bytes and FLOPs depend on besides the layout. Sizes in bytes an element."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int = 1
    element_size: int = 2  # activations (e)
    grad_size: int = 4  # gradients on the wire (eg)
    state_size: int = 4  # L and D: fp32; 8 for fp64
    partial_size: int = 2  # partial outputs of pass-Q and dqkv on the wire; 4 in the accurate mode

    def row_bytes(self, role: Role, heads: Heads | None = None) -> int:
        """Bytes of one token of a role, for the given heads (all when None). Source: burst.md 1.3 and 1.7."""
        nq = self.q_heads if heads is None else heads.q_count
        nk = self.kv_heads if heads is None else heads.kv_count
        d, dv, e, eg = self.head_dim, self.value_dim, self.element_size, self.grad_size
        size: dict[Role, int] = {
            "kv": nk * (d + dv) * e,
            "q": nq * d * e,
            "qd": nq * ((d + dv) * e + 2 * self.state_size),
            "qo": nq * ((d + 2 * dv) * e + self.state_size),
            "part": nq * (dv * self.partial_size + self.state_size),
            "out": nq * dv * e,
            "dq": nq * d * eg,
            "dkv": nk * (d + dv) * eg,
            "qkv": (nq * d + nk * (d + dv)) * e,
            "dout": nq * dv * e,
            "dqkv": (nq * d + nk * (d + dv)) * self.partial_size,
        }
        return size[role] * self.batch


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
    travels: str  # what goes round: kv | q | qd | qo | none
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

    def pieces(self, q_block: int, kv_block: int) -> tuple[Piece, ...]:
        """The mask of a Compute, in rows of the two blocks."""
        found = self._masks.get((q_block, kv_block))
        if found is None:
            found = self._masks[q_block, kv_block] = self.blocks.pieces(
                q_block, kv_block, causal=self.causal, window=self.window, keys=self.key_blocks
            )
        return found

    def places(self, rank: int, device: torch.device) -> tuple[Tensor, ...]:
        """Where the rows of each member of a rank's head group stand in the group's local order, int64 (S,).

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
    def _masks(self) -> dict[tuple[int, int], tuple[Piece, ...]]:
        return {}

    def rows(self, role: Role, block: int) -> int:
        """Rows of one block of a role (for qkv, dout, out, dqkv the block is a rank)."""
        if role in ("qkv", "dout", "out", "dqkv"):
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
