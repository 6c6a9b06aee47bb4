"""What star and apb share: each later host runs an anchor beside its block, and passing blocks may join."""

from __future__ import annotations

from typing import Literal

from apb.plan import Attend, HostPlan, ModelShape, Pass, PrefillPlan, PromptLengths, Region, Select, Step, WaitPassing


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
    plans = []
    for rank, (start, stop) in enumerate(spans):
        visible = rank > 0
        beside = anchor_len if visible else first_host_head
        passing = sum(kept_rows[:rank]) if route != "none" else 0
        steps: list[Step] = []
        if kept_rows[rank]:
            steps.append(Select(kept_rows[rank], skip=min(anchor_len, stop) if rank == 0 else 0))
        if route != "none" and hosts > 1:
            steps.append(Pass(route))
        if beside:
            steps.append(Attend("anchor", ("anchor",), causal=True, pairs=beside * (beside + 1) // 2))
        block = stop - start
        # The passing blocks travel while this runs, so it stands before the wait.
        steps.append(Attend("block", ("block",), causal=True, pairs=block * (block + 1) // 2))
        if route != "none" and hosts > 1:
            steps.append(WaitPassing())
        seen: list[Region] = []
        if visible and beside:
            seen.append("anchor")
        if passing:
            seen.append("passing")
        if seen:
            keys = (beside if visible else 0) + passing
            steps.append(Attend("block", tuple(seen), causal=False, pairs=block * keys))
        plans.append(HostPlan(rank, start, stop, beside, tuple(steps)))
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
