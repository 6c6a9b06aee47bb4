"""Explanation of the fastest exact schedule for a prefill, for ``apb plan burst.explain=true``."""

from __future__ import annotations

from typing import Any

from apb.plan.plan import PrefillPlan
from burst.errors import UserError
from burst.layouts.layout import layout
from burst.planner import planner
from burst.planner.topology import topology
from launch.config.settings import BurstSettings
from launch.terminal.display import Display


def explain(plan: PrefillPlan, settings: BurstSettings, device: str, display: Display) -> dict[str, Any]:
    """Show the planner's table for one layer of this prefill and return it; raises UserError for speeds or nodes.

    Positions are laid out as the plan's strategy does, in zigzag where it is not an exact one.
    """
    machine = settings.machine if settings.machine != "auto" else device.partition(":")[0]
    name = plan.spread.layout if plan.spread is not None else "zigzag"
    tokens = layout(name, plan.lengths.context, plan.hosts)
    sharded = [kind.attention_shape(plan.shape.element_size) for kind in plan.shape.sharded]
    if not sharded:
        raise UserError(
            "no layer of this model attends over hosts",
            given="burst.explain=true",
            allowed="models with full or latent layers",
            remedy="Leave burst.explain out.",
        )
    found = planner.plan(tokens, sharded[0], topology(plan.hosts, settings.nodes, machine))
    display.note(
        f"Exact attention of one layer (of {plan.shape.layers}), {name}, {plan.hosts} hosts on {settings.nodes} "
        f"machine(s), speeds assumed for {machine}:",
        style="bold",
    )
    display.note(found.table().rstrip())
    return {"layout": name, "nodes": settings.nodes, "machine": machine, "layers": plan.shape.layers} | found.to_dict()
