"""Work, bytes and buffers of exact attention over hosts in one layer, in closed form.

``burst``'s schedules write every message out, of which a thousand hosts have a million; tests hold the two together.
Arrays have one number a host, or (in ``_ring``) one a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from burst.layouts.layout import Layout
from burst.schedules import AttentionShape, Heads, head_split

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """By host: pairs computed, and keys attended to, each head by itself; bytes sent by kind; bytes of buffers."""

    head_pairs: tuple[int, ...]
    head_keys: tuple[int, ...]
    sent: tuple[dict[str, int], ...]
    workspace: tuple[int, ...]


@lru_cache(maxsize=64)
def counts(name: str, layout: Layout, shape: AttentionShape, members: int) -> Counts:
    """Count for the schedule ``name`` on hosts of one machine; ``members`` hosts share their tokens by heads."""
    hosts = layout.world
    split = head_split(shape.q_heads, shape.kv_heads, members) if members > 1 else (_all(shape),)
    blocks = layout.grouped([range(g, g + members) for g in range(0, hosts, members)]) if members > 1 else layout
    pairs, seen, passed, held = _ring(blocks, straight=name == "allgather")
    rows = np.asarray(layout.counts, dtype=np.int64)
    group, member = np.arange(hosts) // members, np.arange(hosts) % members
    working = np.array([h.q_count > 0 for h in split])[member]
    own = {role: _by_host(split, member, shape, role) for role in ("kv", "qkv", "out")}
    heads = np.array([h.q_count for h in split], dtype=np.int64)[member]
    sent = {"kv": np.where(working, passed[group] * own["kv"], 0)}
    space = np.where(working, held[group] * own["kv"], 0)
    if members > 1:
        others = rows.reshape(-1, members).sum(axis=1)[group] - rows  # of the group's other members
        dealt = [shape.row_bytes("qkv", h) for h in split if h.q_count]
        mine = np.where(working, own["qkv"], 0)
        busy = len(dealt) - working  # other members that have heads
        sent["qkv"] = rows * (sum(dealt) - mine)
        sent["out"] = np.where(working, others * own["out"], 0)
        space = space + others * mine + rows * busy * own["out"]
        space = space + (others + rows) * (own["qkv"] + own["out"])  # the group's tokens for this member's heads
    return Counts(
        tuple(int(x) for x in pairs[group] * heads),
        tuple(int(x) for x in seen[group] * heads),
        tuple({kind: int(each[r]) for kind, each in sent.items()} for r in range(hosts)),
        tuple(int(x) for x in space),
    )


def _ring(blocks: Layout, *, straight: bool) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Return by block: unmasked pairs of its queries, and rows that these see; rows that its holder sends, and rows of
    buffers it needs.

    A block goes from need to need round the ring, or ``straight`` from home to all who need it.
    """
    n = blocks.world
    rows = np.asarray(blocks.counts, dtype=np.int64)
    edges = [[(s.start, s.stop) for s in spans] for spans in blocks.spans]
    pairs = np.array([sum((b * (b + 1) - a * (a + 1)) // 2 for a, b in held) for held in edges], dtype=np.int64)
    last = np.array([held[-1][1] if held else -1 for held in edges])
    first = np.array([held[0][0] if held else np.iinfo(np.int64).max for held in edges])
    holder, block = np.arange(n)[:, None], np.arange(n)[None]
    needs_HB = (last[:, None] > first[None]) & (holder != block)
    turn_HB = (holder - block) % n
    seen = rows + needs_HB @ rows
    if straight:
        return pairs, seen, rows * needs_HB.sum(axis=0), needs_HB @ rows
    end_B = np.where(needs_HB, turn_HB, 0).max(axis=0)
    passed = ((needs_HB | (holder == block)) & (turn_HB < end_B[None])) @ rows
    # Received blocks fill two buffers in turn, each as long as the longest block that it holds.
    odd = needs_HB & (turn_HB % 2 == 1)
    held = sum(np.where(each, rows[None], 0).max(axis=1) for each in (odd, needs_HB & ~odd))
    return pairs, seen, passed, np.asarray(held)


def _all(shape: AttentionShape) -> Heads:
    return Heads(0, shape.q_heads, 0, shape.kv_heads)


def _by_host(split: Sequence[Heads], member: Numbers, shape: AttentionShape, role: str) -> Numbers:
    return np.array([shape.row_bytes(role, heads) for heads in split], dtype=np.int64)[member]  # type: ignore[arg-type]
