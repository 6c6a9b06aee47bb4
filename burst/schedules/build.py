"""Making of schedules by name: the ways of the blocks, and every rank's program from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from burst.errors import UserError, choose
from burst.layouts.layout import Layout
from burst.schedules.base import Schedule
from burst.schedules.heads import HeadGroups, head_split
from burst.schedules.payload import AttentionShape, Heads, Role
from burst.schedules.programs import Traffic, program
from burst.schedules.routes import Grid, Hop, Needs, chain, home, ring, star
from burst.schedules.steps import Phase

NAMES = ("allgather", "burst", "double_ring", "ring", "ulysses", "usp")
TRAVELS: dict[Phase, tuple[Role, ...]] = {"forward": ("kv", "q"), "backward": ("kv", "qd")}


def schedule(
    name: str,
    layout: Layout,
    shape: AttentionShape,
    *,
    phase: Phase = "forward",
    nodes: Sequence[int] | None = None,
    causal: bool = True,
    window: int | None = None,
    keys: Layout | None = None,
    travels: str = "auto",
    ulysses: int | None = None,
) -> Schedule:
    """Make every rank's program for one phase of exact attention.

    ``nodes[r]`` is the machine of rank r (one machine when None). ``keys`` is the layout of the keys where it
    is not the queries' (``Layout.extend``). ``travels``: ``kv``; in the forward ``q`` (pass-Q), in the
    backward ``qd`` (Q-pass); ``auto`` is the cheaper of both by bytes for ``burst`` and for a forward over
    history, ``kv`` otherwise. ``ulysses`` is the number of ranks that share tokens by heads in ``usp`` (the
    ranks of a node when None). Raises UserError when something does not fit.

    Source: Ring Attention; BurstAttention (double ring, Q-pass); Llama 3 (all-gather); DeepSpeed-Ulysses; USP.
    """
    choose("schedule", name, NAMES)
    machines = tuple(nodes) if nodes is not None else (0,) * layout.world
    _check(layout, shape, machines, window, keys)
    members = head_groups(name, machines, ulysses)
    if members > 1 and keys is not None:
        raise UserError(
            f"'{name}' deals queries and keys out together",
            given="keys of a longer history",
            allowed="keys with the queries' layout",
            remedy="Use ring, double_ring, burst or allgather for chunks over history.",
        )
    if travels == "auto":
        by_bytes = name == "burst" or (phase == "forward" and keys is not None)
        travels = cheapest_travel(phase, layout, shape, keys) if by_bytes and name != "allgather" else "kv"
    choose("traveller", travels, TRAVELS[phase] if name != "allgather" else ("kv",))
    heads = head_split(shape.q_heads, shape.kv_heads, members) if members > 1 else ()
    return _build(name, layout, shape, keys, phase, machines, causal, window, travels, heads)


def cheapest_travel(phase: Phase, layout: Layout, shape: AttentionShape, keys: Layout | None = None) -> str:
    """Return what a ring sends the fewest bytes with: ``kv``, or ``q`` (forward) and ``qd`` (backward).

    Per block: blocks make P-1 hops, sums of gradients P, partial outputs P-1. Source: docs/schedules.md, bytes.
    """
    hops = layout.world - 1
    q_rows, kv_rows = sum(layout.counts), sum((keys or layout).counts)
    if phase == "forward":
        kv = kv_rows * shape.row_bytes("kv")
        q = q_rows * (shape.row_bytes("q") + shape.row_bytes("part"))
        return "kv" if kv <= q else "q"
    kv = kv_rows * (shape.row_bytes("kv") * hops + shape.row_bytes("dkv") * (hops + 1))
    q = q_rows * (shape.row_bytes("qd") * hops + shape.row_bytes("dq") * (hops + 1))
    return "kv" if kv <= q else "qd"


@lru_cache(maxsize=256)
def _build(
    name: str,
    layout: Layout,
    shape: AttentionShape,
    keys: Layout | None,
    phase: Phase,
    nodes: tuple[int, ...],
    causal: bool,
    window: int | None,
    travels: Role,
    heads: tuple[Heads, ...],
) -> Schedule:
    members = max(1, len(heads))
    blocks, key_blocks = layout, keys or layout
    if members > 1:
        groups = [range(g, g + members) for g in range(0, layout.world, members)]
        blocks, key_blocks = layout.grouped(groups), key_blocks.grouped(groups)
    grid = _grid(name, blocks.world, nodes)

    def needs(rank: int, block: int) -> bool:
        q, kv = (rank, block) if travels == "kv" else (block, rank)
        return bool(blocks.pieces(q, kv, causal=causal, window=window, keys=key_blocks))

    traffic = _traffic(name, grid, needs, phase, travels)
    inner = [program(block, grid, needs, traffic) for block in range(grid.world)]
    if members == 1:
        programs = tuple(inner)
    else:
        wrapper = HeadGroups(layout, heads, phase)
        working = [heads[r % members].q_count > 0 for r in range(layout.world)]
        programs = tuple(wrapper.wrap(r, inner[r // members] if working[r] else ()) for r in range(layout.world))
    return Schedule(name, phase, travels, shape, layout, blocks, key_blocks, nodes, causal, window, programs, heads)


def _traffic(name: str, grid: Grid, needs: Needs, phase: Phase, travels: Role) -> Traffic:
    hops: list[Hop] = star(grid, needs) if name == "allgather" else ring(grid, needs)
    if phase == "forward":
        return Traffic(phase, travels, hops, *(("part", home(grid, needs)) if travels == "q" else ()))
    back = home(grid, needs) if name == "allgather" else chain(grid, needs)
    return Traffic(phase, travels, hops, "dkv" if travels == "kv" else "dq", back)


def _grid(name: str, world: int, nodes: tuple[int, ...]) -> Grid:
    if name not in ("double_ring", "burst"):
        return Grid(1, world)
    size = nodes.count(nodes[0])
    regular = all(len(set(nodes[i : i + size])) == 1 for i in range(0, world, size))
    if not regular or world % size or len(set(nodes)) != world // size:
        if name == "burst":
            return Grid(1, world)
        raise UserError(
            "a double ring needs nodes of equal size, ranks side by side",
            given=nodes,
            allowed="such as 0, 0, 1, 1",
            remedy="Order the ranks by node, or use the schedule 'ring'.",
        )
    # One rank a node, or one node: a flat ring, which needs no second level.
    return Grid(1, world) if size in (1, world) else Grid(world // size, size)


def head_groups(name: str, nodes: tuple[int, ...], ulysses: int | None) -> int:
    """Return how many ranks share their tokens by heads; 1 but in ``usp`` and ``ulysses``. Raises UserError."""
    world = len(nodes)
    if name == "ulysses":
        return world
    if name != "usp":
        return 1
    members = nodes.count(nodes[0]) if ulysses is None else ulysses
    if members < 1 or world % members:
        raise UserError(
            "the ranks do not divide into head groups",
            given=f"{world} ranks, groups of {members}",
            allowed=[m for m in range(1, world + 1) if world % m == 0],
            remedy="Set ulysses to a divisor of the number of ranks.",
        )
    return members


def _check(
    layout: Layout, shape: AttentionShape, nodes: tuple[int, ...], window: int | None, keys: Layout | None
) -> None:
    if len(nodes) != layout.world or (keys is not None and keys.world != layout.world):
        raise UserError(
            "layout, keys and nodes differ in their number of ranks",
            given=(layout.world, keys.world if keys else None, len(nodes)),
            allowed="one number",
            remedy="Make them for the same world.",
        )
    if window is not None and window < 1:
        remedy = "Count the query's own key in."
        raise UserError("the window holds no key", given=window, allowed="1 or more, or None", remedy=remedy)
    if shape.kv_heads < 1 or shape.q_heads % shape.kv_heads:
        raise UserError(
            "heads do not group",
            given=f"{shape.q_heads} over {shape.kv_heads} kv heads",
            allowed="a whole ratio",
            remedy="Pass k and v unrepeated.",
        )
