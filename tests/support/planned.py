"""The dense twin of any strategy and compressor: lengths are read from the plan, scores are the compressor's own.

Shapes: B batch (1), H query heads, K kv heads, L block tokens, S tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import Candidates, Compressor
from apb.layers.rows import Projections
from apb.models.adapter import Adapter
from apb.plan.plan import PrefillPlan
from apb.plan.steps import Attend
from apb.prompt.prompt import Prompt
from tests.support.twin import Rotate, Seen, Sizes, Twin, sizes, twin


@dataclass(frozen=True)
class ByScore:
    """A compressor as the twin's rule of selection."""

    compressor: Compressor
    rotate: Rotate

    @property
    def needs_question(self) -> bool:
        """Whether it wants the question's queries."""
        return self.compressor.needs_question

    def __call__(self, block: Seen) -> Tensor:
        """Return scores (K, L)."""

        def turn(x_BHSD: Tensor, delta: int | Tensor) -> Tensor:
            if isinstance(delta, int):
                return self.rotate(x_BHSD[0], delta, block.layer)[None]
            tokens = zip(x_BHSD[0].split(1, dim=1), delta.tolist(), strict=True)
            return torch.cat([self.rotate(x, by, block.layer) for x, by in tokens], dim=1)[None]

        raw = Projections(*(x[None] for x in block.raw_LE)) if self.compressor.needs_projections else None
        asked = block.question_HQD[None] if self.needs_question else None
        own = (block.q_HLD[None], block.k_KLD[None], block.v_KLD[None])
        seen = Candidates(block.layer, block.number, *own, block.scale, asked, raw, block.start, block.end, turn)
        return self.compressor.score(seen)[0].clone()


def planned_sizes(plan: PrefillPlan, prompt: Prompt, asks: bool) -> Sizes:
    """Return a plan's lengths; those of full attention on one host for a plan that is exact."""
    if plan.exact:
        return sizes("full", prompt, 1)
    spans = sorted(span for host in plan.host_plans for span in host.spans)
    keys: dict[int, set[str]] = {number: set() for number in range(len(spans))}
    for host, numbers in zip(plan.host_plans, plan.numbers, strict=True):
        for step in host.steps:
            if isinstance(step, Attend) and step.queries == "block":
                keys[numbers[step.block]] |= set(step.keys)
    rows = plan.kept_rows if plan.route != "none" else (0,) * len(spans)
    head = plan.anchor_skip + plan.question_len if asks and rows[0] else 0
    beside = tuple(plan.anchor_len if "anchor" in keys[number] else 0 for number in range(1, len(spans)))
    return Sizes(
        tuple(spans),
        plan.anchor_len,
        plan.anchor_skip,
        plan.question_len,
        rows,
        (head, *beside),
        plan.numbers,
        frozenset(number for number, seen in keys.items() if "passing" not in seen),
    )


def planned_twin(
    adapter: Adapter, rotate: Rotate, prompt: Prompt, plan: PrefillPlan, compressor: Compressor | None
) -> Twin:
    """Prefill and ask in one forward pass as the plan says."""
    select = ByScore(compressor, rotate) if compressor is not None else None
    found = planned_sizes(plan, prompt, compressor is not None and compressor.needs_question)
    return twin(adapter, rotate, prompt, found, plan.hosts, select=select)
