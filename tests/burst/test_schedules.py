"""Schedules as data: what the checker proves of them, that it notices defects, what programs look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burst.errors import UserError
from burst.layouts.layout import layout
from burst.schedules import NAMES, AttentionShape, Compute, Fold, Post, Schedule, ScheduleStep, Slot, Wait, schedule
from burst.schedules.check import ScheduleError, check
from burst.schedules.heads import head_split
from tests.support.schedule_cases import GQA, MASKS, MHA, TOPOLOGIES, UNEVEN, spread, ways


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t[0]}over{t[1]}")
def test_every_schedule_is_proved(name: str, topology: tuple[int, int]) -> None:
    world, nodes = topology
    for n, (causal, window), phase in product((3, 37), MASKS, ("forward", "backward")):
        lay = layout(("contiguous", "striped", "zigzag")[n % 3 if window is None else 2], n, world)
        for travels in ways(name, phase):
            made = schedule(
                name,
                lay,
                UNEVEN,
                phase=phase,
                nodes=spread(world, nodes),
                causal=causal,
                window=window,
                travels=travels,
            )
            check(made)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_packed_documents_and_empty_ranks(name: str, kind: str) -> None:
    for edges, world in product(([0, 7, 14, 16], [0, 1], [0, 2, 2, 3], [0, 120, 1248, 4232]), (4, 8)):
        lay = layout(kind, edges[-1], world, edges)
        for phase in ("forward", "backward"):
            check(schedule(name, lay, GQA, phase=phase, nodes=spread(world, 2)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_schedule_is_proved(data: st.DataObject) -> None:
    name, phase = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(["forward", "backward"]))
    size, nodes = data.draw(st.sampled_from([(1, 1), (3, 1), (1, 4), (2, 2), (3, 2), (2, 3), (4, 2)]))
    n = data.draw(st.integers(0, 60))
    cuts = data.draw(st.lists(st.integers(0, n), max_size=3))
    kind = data.draw(st.sampled_from(["contiguous", "striped", "zigzag"]))
    made = schedule(
        name,
        layout(kind, n, size * nodes, [0, *sorted(cuts), n]),
        data.draw(st.sampled_from([GQA, MHA, UNEVEN])),
        phase=phase,
        nodes=spread(size * nodes, nodes),
        causal=data.draw(st.booleans()),
        window=data.draw(st.one_of(st.none(), st.integers(1, 30))),
        travels=data.draw(st.sampled_from(ways(name, phase))),
    )
    check(made)


@pytest.mark.parametrize("name", ["ring", "double_ring", "burst", "allgather"])
def test_chunks_over_history(name: str) -> None:
    queries, keys = layout("zigzag", 61, 4).extend(7)
    for phase, window in product(("forward", "backward"), (None, 12)):
        for travels in ways(name, phase):
            made = schedule(
                name,
                queries,
                GQA,
                phase=phase,
                nodes=[0, 0, 1, 1],
                keys=keys,
                window=window,
                travels=travels,
            )
            check(made)


# -- the checker notices ----------------------------------------------------------------------------------

SAMPLES = [
    ("ring", "backward", "kv", 3, 1),
    ("ring", "forward", "q", 3, 1),
    ("burst", "forward", "kv", 4, 2),
    ("burst", "backward", "qd", 4, 2),
    ("allgather", "backward", "kv", 3, 1),
    ("ulysses", "forward", "kv", 3, 1),
    ("usp", "backward", "kv", 4, 2),
]


def sample(name: str, phase: str, travels: str, world: int, nodes: int) -> Schedule:
    made = schedule(
        name,
        layout("zigzag", 16, world),
        MHA,
        phase=phase,
        nodes=spread(world, nodes),
        travels=travels,
    )
    check(made)
    return made


def mutants(made: Schedule, change: Callable[[ScheduleStep], list[ScheduleStep] | None]) -> list[Schedule]:
    """All schedules with one step of one rank changed; ``change`` gives None for steps it does not touch."""
    out = []
    for r, program in enumerate(made.programs):
        for i, step in enumerate(program):
            new = change(step)
            if new is not None:
                changed = (*program[:i], *new, *program[i + 1 :])
                out.append(replace(made, programs=(*made.programs[:r], changed, *made.programs[r + 1 :])))
    return out


def moved_recv(step: ScheduleStep) -> list[ScheduleStep] | None:
    """Receive into a slot that nobody else uses."""
    if not isinstance(step, Post) or not step.recvs:
        return None
    first = step.recvs[0]
    return [replace(step, recvs=(first._replace(slot=Slot(first.slot.role, 9)), *step.recvs[1:]))]


def swapped_buffer(step: ScheduleStep) -> list[ScheduleStep] | None:
    """Read keys, or queries, from the next slot."""
    if not isinstance(step, Compute):
        return None
    travels_kv = step.kv.index > 0
    slot = step.kv if travels_kv else step.q
    return [replace(step, **{"kv" if travels_kv else "q": Slot(slot.role, slot.index + 1)})]


def missing_send(step: ScheduleStep) -> list[ScheduleStep] | None:
    return [replace(step, sends=step.sends[1:])] if isinstance(step, Post) and step.sends else None


def wrong_block(step: ScheduleStep) -> list[ScheduleStep] | None:
    if not isinstance(step, Post) or not step.sends:
        return None
    first = step.sends[0]
    return [replace(step, sends=(first._replace(block=first.block + 1), *step.sends[1:]))]


@pytest.mark.parametrize("which", SAMPLES, ids=lambda s: "-".join(map(str, s[:3])))
def test_every_step_is_needed(which: tuple[str, str, str, int, int]) -> None:
    made = sample(*which)
    for mutant in mutants(made, lambda step: []):
        with pytest.raises(ScheduleError):
            check(mutant)


@pytest.mark.parametrize("change", [moved_recv, swapped_buffer, missing_send, wrong_block])
@pytest.mark.parametrize("which", SAMPLES, ids=lambda s: "-".join(map(str, s[:3])))
def test_wrong_buffers_and_messages_are_noticed(
    which: tuple[str, str, str, int, int], change: Callable[[ScheduleStep], list[ScheduleStep] | None]
) -> None:
    found = mutants(sample(*which), change)
    assert found
    for mutant in found:
        with pytest.raises(ScheduleError):
            check(mutant)


def test_work_done_twice_is_noticed() -> None:
    made = sample("ring", "backward", "kv", 3, 1)
    for kind in (Compute, Fold):
        for mutant in mutants(made, lambda step, kind=kind: [step, step] if isinstance(step, kind) else None):
            with pytest.raises(ScheduleError, match=r"second time|already in"):
                check(mutant)


def test_receives_before_sends_are_a_deadlock() -> None:
    """A ring in which everyone first waits for its neighbour, as unbatched blocking calls would."""
    made = sample("ring", "forward", "kv", 3, 1)

    def blocking(program: tuple[ScheduleStep, ...]) -> tuple[ScheduleStep, ...]:
        out: list[ScheduleStep] = []
        for step in program:
            if isinstance(step, Post):
                out += [
                    replace(step, sends=()),
                    Wait(step.name),
                    replace(step, name=step.name + 50, recvs=()),
                ]
            elif isinstance(step, Wait):
                out.append(Wait(step.name + 50))
            else:
                out.append(step)
        return tuple(out)

    with pytest.raises(ScheduleError, match=r"deadlock: ranks .0, 1, 2. wait"):
        check(replace(made, programs=tuple(blocking(p) for p in made.programs)))


def test_a_buffer_filled_while_it_is_read_is_noticed() -> None:
    """With one receive buffer instead of two, the next block comes in while this one is sent on."""
    made = sample("ring", "forward", "kv", 4, 1)

    def single(step: ScheduleStep) -> ScheduleStep:
        if isinstance(step, Post):
            sends = tuple(p._replace(slot=Slot("kv", min(p.slot.index, 1))) for p in step.sends)
            return replace(step, sends=sends, recvs=tuple(p._replace(slot=Slot("kv", 1)) for p in step.recvs))
        return replace(step, kv=Slot("kv", min(step.kv.index, 1))) if isinstance(step, Compute) else step

    with pytest.raises(ScheduleError, match="a send from it is under way"):
        check(replace(made, programs=tuple(tuple(map(single, p)) for p in made.programs)))


# -- shape of the programs --------------------------------------------------------------------------------


def test_transfers_are_posted_before_the_work_that_hides_them() -> None:
    made = schedule("double_ring", layout("zigzag", 64, 8), GQA, nodes=spread(8, 2))
    for program in made.programs:
        for i, step in enumerate(program):
            if isinstance(step, Post):
                until = program.index(Wait(step.name))
                work = sum(isinstance(s, Compute) for s in program[i:until])
                assert work == (4 if step.channel == "inter" else 1)  # a whole round early; one step early


def test_rings_keep_two_buffers_and_double_rings_four() -> None:
    lay = layout("zigzag", 64, 8)
    for name, phase, buffers in (("ring", "forward", 2), ("ring", "backward", 5), ("burst", "forward", 4)):
        made = schedule(name, lay, GQA, nodes=spread(8, 2), phase=phase)
        assert {len(made.slot_blocks(r)) for r in range(8)} <= {buffers, buffers - 1}


def test_blocks_go_only_where_they_are_needed() -> None:
    lay = layout("contiguous", 64, 8)
    causal = schedule("ring", lay, GQA)
    assert [len(causal.sends(r)) for r in range(8)] == [1, 2, 3, 4, 5, 6, 7, 0]
    windowed = schedule("ring", lay, GQA, window=9)
    assert [len(windowed.sends(r)) for r in range(8)] == [1] * 7 + [0]
    assert sum(isinstance(s, Compute) for s in windowed.programs[5]) == 2
    zigzag = schedule("ring", layout("zigzag", 64, 8), GQA, window=4)
    assert max(len(zigzag.sends(r)) for r in range(8)) <= 2  # neighbours on both sides, whoever lies between
    documents = schedule("allgather", layout("contiguous", 64, 8, [0, 16, 32, 48, 64]), GQA, causal=False)
    assert [len(documents.sends(r)) for r in range(8)] == [1] * 8


def test_plain_paths() -> None:
    lay = layout("zigzag", 32, 4)
    ring = schedule("ring", lay, GQA)
    for nodes in ([0] * 4, [0, 1, 2, 3]):
        assert schedule("double_ring", lay, GQA, nodes=nodes).programs == ring.programs
    for name in NAMES:
        alone = schedule(name, layout("zigzag", 32, 1), GQA, phase="backward")
        assert [type(s) for s in alone.programs[0]] == [Compute]


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 8), (8, 2), (9, 3), (32, 4), (6, 1), (14, 2), (3, 3)])
def test_heads_are_dealt_out_once_and_group_evenly(q_heads: int, kv_heads: int) -> None:
    group = q_heads // kv_heads
    for members in range(1, 17):
        dealt = head_split(q_heads, kv_heads, members)
        assert [h for part in dealt for h in range(part.q_start, part.q_stop)] == list(range(q_heads))
        for part in dealt:
            assert {h // group for h in range(part.q_start, part.q_stop)} == set(range(part.kv_start, part.kv_stop))
            assert part.kv_count == 0 or part.q_count % part.kv_count == 0
        if q_heads % members == 0 and (kv_heads % members == 0 or members % kv_heads == 0):
            assert {part.q_count for part in dealt} == {q_heads // members}


def test_digests_tell_schedules_apart() -> None:
    lay = layout("zigzag", 32, 4)
    same = {schedule("ring", lay, GQA).digest for _ in range(2)}
    others = {schedule("ring", layout("striped", 32, 4), GQA).digest, schedule("allgather", lay, GQA).digest}
    assert len(same) == 1 and len(same | others) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "rings"}, "Did you mean ring"),
        ({"nodes": [0, 0, 1]}, "one number"),
        ({"nodes": [0, 0, 0, 1], "name": "double_ring"}, "nodes of equal size"),
        ({"window": 0}, "1 or more"),
        ({"travels": "qd"}, "unknown traveller"),
        ({"name": "usp", "ulysses": 3}, "divide into head groups"),
        ({"shape": AttentionShape(9, 2, 64, 64)}, "whole ratio"),
        ({"name": "ulysses", "keys": layout("zigzag", 9, 4)}, "longer history"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], said: str) -> None:
    arguments = {"name": "ring", "layout": layout("zigzag", 8, 4), "shape": GQA} | options
    with pytest.raises(UserError, match=said):
        schedule(**arguments)
