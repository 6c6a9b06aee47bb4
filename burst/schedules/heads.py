"""Dealing attention out by heads (Ulysses): each member of a group gets the group's tokens for some heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from burst.layouts.layout import Layout
from burst.schedules.payload import Heads, Role
from burst.schedules.steps import Compute, Fold, Parcel, Phase, Post, Regroup, ScheduleStep, Slot, Wait


def head_split(q_heads: int, kv_heads: int, members: int) -> tuple[Heads, ...]:
    """Deal heads to members: whole kv heads while there are enough, else query heads of one kv head each.

    Every member's query heads group evenly over its kv heads, so any GQA kernel takes them. The busiest
    member has ceil(K / members) kv heads, or ceil(H / K / floor(members / K)) query heads. Source: the bytes in
    docs/schedules.md, K' = max(K, P).
    """
    group = q_heads // kv_heads
    if members <= kv_heads:
        edges = [m * kv_heads // members for m in range(members + 1)]
        return tuple(Heads(a * group, b * group, a, b) for a, b in pairwise(edges))
    out: list[Heads] = []
    owners = [k * members // kv_heads for k in range(kv_heads + 1)]
    for k in range(kv_heads):
        sharing = owners[k + 1] - owners[k]
        for i in range(sharing):
            first, last = k * group + i * group // sharing, k * group + (i + 1) * group // sharing
            out.append(Heads(first, last, k, k + (last > first)))
    return tuple(out)


class HeadGroups:
    """The exchanges by heads around each head group's own program.

    Rank r is member ``r % members`` of group ``r // members``; the members of a group are neighbours, so with
    as many members as a node has ranks the exchanges stay inside nodes.
    """

    def __init__(self, layout: Layout, heads: Sequence[Heads], travels_by_heads: Phase) -> None:
        self._layout, self._heads, self._phase = layout, tuple(heads), travels_by_heads

    def wrap(self, rank: int, inner: Sequence[ScheduleStep]) -> tuple[ScheduleStep, ...]:
        """Put ``inner`` (peers are groups) between the exchange to the head groups and the one back."""
        going: Role = "qkv" if self._phase == "forward" else "dout"
        coming: Role = "out" if self._phase == "forward" else "dqkv"
        member = rank % len(self._heads)

        def to_heads(peer: int) -> tuple[Parcel, Parcel]:
            m = peer % len(self._heads)
            send = Parcel(peer, Slot(going, 0), rank, m)
            return send, Parcel(peer, Slot(going, m + 1), peer, member)

        def back(peer: int) -> tuple[Parcel, Parcel]:
            m = peer % len(self._heads)
            send = Parcel(peer, Slot(coming, 0), peer, member)
            return send, Parcel(peer, Slot(coming, m + 1), rank, m)

        middle = [_renamed(step, len(self._heads), member) for step in inner]
        start = self._exchange(rank, 0, going, to_heads)
        end = self._exchange(rank, 1, coming, back)
        return (*start, *middle, *end)

    def _exchange(
        self, rank: int, name: int, role: Role, parcels: Callable[[int], tuple[Parcel, Parcel]]
    ) -> list[ScheduleStep]:
        members = len(self._heads)
        group = rank - rank % members
        pairs = [parcels(peer) for peer in range(group, group + members) if peer != rank]
        sends = tuple(send for send, _ in pairs if self._holds(send))
        recvs = tuple(recv for _, recv in pairs if self._holds(recv))
        slots: list[Slot | None] = [None] * members
        for recv in recvs:
            slots[recv.peer % members] = recv.slot
        slots[rank % members] = Slot(role, 0)
        steps: list[ScheduleStep] = [Regroup(role, tuple(slots))]
        if sends or recvs:
            steps = [Post(name, f"heads-{role}", sends, recvs), Wait(name), *steps]
        return steps

    def _holds(self, parcel: Parcel) -> bool:
        assert parcel.heads is not None
        return self._layout.counts[parcel.block] > 0 and self._heads[parcel.heads].q_count > 0


def _renamed(step: ScheduleStep, members: int, member: int) -> ScheduleStep:
    """Turn a group's number into the rank of its ``member``, and leave names 0 and 1 to the exchanges."""

    def moved(parcels: tuple[Parcel, ...]) -> tuple[Parcel, ...]:
        return tuple(p._replace(peer=p.peer * members + member) for p in parcels)

    match step:
        case Post():
            return Post(step.name + 2, step.channel, moved(step.sends), moved(step.recvs))
        case Wait():
            return Wait(step.name + 2)
        case Compute() | Fold() | Regroup():
            return step
