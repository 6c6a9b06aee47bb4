"""What star and apb share: each later host runs an anchor beside its block, and passing blocks may join."""

from __future__ import annotations

from typing import Literal

from apb.plan import ModelShape, PrefillPlan, PromptLengths
from apb.steps import Attend, HostPlan, Pass, Region, Select, Step, WaitPassing


def anchored_plan(
    *,
    strategy: str,
    compressor: str | None,
    shape: ModelShape,
    lengths: PromptLengths,
    spans: list[tuple[int, int]],
    anchor_len: int,
    anchor_skip: int,
    question_len: int,
    route: Literal["ring", "allgather", "none"],
    kept_rows: tuple[int, ...],
    first_host_head: int,
) -> PrefillPlan:
    """Put the hosts' steps together. ``first_host_head``: tokens that host 0, which has no anchor, runs beside its
    block (unseen by it) so that its compressor knows the question."""
    hosts = len(spans)
    passes = route if hosts > 1 else "none"
    plans = []
    for rank, (start, stop) in enumerate(spans):
        beside = anchor_len if rank else first_host_head
        steps = _steps(
            block=stop - start,
            beside=beside,
            sees_anchor=rank > 0,
            select=Select(kept_rows[rank], skip=min(anchor_len, stop) if rank == 0 else 0),
            route=passes,
            passing=0 if passes == "none" else sum(kept_rows[:rank]),
        )
        plans.append(HostPlan(rank, ((start, stop),), beside, steps))
    return PrefillPlan(
        strategy=strategy,
        compressor=compressor,
        shape=shape,
        lengths=lengths,
        anchor_len=anchor_len if hosts > 1 else 0,
        anchor_skip=anchor_skip,
        question_len=question_len,
        route=route,
        kept_rows=kept_rows,
        exact=hosts == 1,
        host_plans=tuple(plans),
    )


def _steps(
    *,
    block: int,
    beside: int,
    sees_anchor: bool,
    select: Select,
    route: Literal["ring", "allgather", "none"],
    passing: int,
) -> tuple[Step, ...]:
    """Return one host's steps in order; lengths in tokens, ``passing``: rows that arrive from earlier hosts."""
    steps: list[Step] = []
    if select.rows:
        steps.append(select)
    if route != "none":
        steps.append(Pass(route))
    if beside:
        steps.append(Attend("anchor", ("anchor",), causal=True, pairs=beside * (beside + 1) // 2))
    # The passing blocks travel while this runs, so it stands before the wait.
    steps.append(Attend("block", ("block",), causal=True, pairs=block * (block + 1) // 2))
    if route != "none":
        steps.append(WaitPassing())
    lengths: dict[Region, int] = {"anchor": beside if sees_anchor else 0, "passing": passing}
    seen = tuple(region for region, length in lengths.items() if length)
    if seen:
        steps.append(Attend("block", seen, causal=False, pairs=block * sum(lengths.values())))
    return tuple(steps)
