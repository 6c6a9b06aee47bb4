"""The steps of a rank's program, and the slots that they read and write.

A **block** is the rows of one rank (of one head group's ranks in ``usp`` and ``ulysses``). A **slot** is a buffer
(role, index); ``burst.schedules.payload`` lists the roles. Index 0 is the rank's own: for input roles the caller's
tensors, never overwritten; for result roles the accumulator that is the rank's answer at the end, empty before the
first write. Index 1.. is workspace, allocated by the executor for the largest block that it holds
(``Schedule.slot_blocks``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from burst.schedules.payload import Role

Phase = Literal["forward", "backward"]
INPUTS: tuple[Role, ...] = ("kv", "q", "qd")  # roles whose slot 0 is the caller's
BORDER: tuple[Role, ...] = ("qkv", "dout", "out", "dqkv")  # roles of the exchanges between head groups


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
    ``out`` or ``part``. Backward: ``q`` has role qd (own: slot 0), ``results`` are a ``dq`` and a
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
    share a kv head, their ``dqkv`` are summed in member order, in the accumulator type. A slot of None
    brings nothing (no rows or heads).
    """

    role: Role
    slots: tuple[Slot | None, ...]


ScheduleStep = Post | Wait | Compute | Fold | Regroup
