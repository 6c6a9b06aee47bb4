"""Checks of a plan that a strategy, which may be another package's, has made."""

from __future__ import annotations

from apb.plan.plan import PrefillPlan
from burst.errors import UserError


def check_whole(plan: PrefillPlan, hosts: int) -> None:
    """Reject a plan whose hosts do not hold every context token once; raises UserError."""
    wrong = "" if plan.hosts == hosts else f"a plan for {plan.hosts} hosts"
    at = 0
    for start, stop in sorted(span for host in plan.host_plans for span in host.spans):
        if start != at or stop < start:
            wrong = wrong or f"a block of tokens {start} to {stop} where one from {at} on is due"
        at = stop
    if at != plan.lengths.context:
        wrong = wrong or f"blocks up to token {at}"
    if wrong:
        raise UserError(
            f"strategy '{plan.strategy}' does not spread the whole context over the hosts",
            given=wrong,
            allowed=f"{hosts} hosts whose blocks hold the tokens 0 to {plan.lengths.context} once each",
            remedy="Mend the spans of the strategy's plan; apb.plan.split.blocks makes some.",
        )
