"""Split of a context into contiguous blocks."""

from __future__ import annotations

import itertools

from burst.errors import UserError


def blocks(context: int, hosts: int) -> list[tuple[int, int]]:
    """Split ``context`` tokens into contiguous blocks: the first ``context % hosts`` hosts hold one token more.

    Raises UserError when there are no hosts or fewer tokens than hosts. Source: APB section 3.1; uneven split ours.
    """
    if hosts < 1:
        raise UserError(
            "a prefill needs at least one host", given=hosts, allowed="1 or more", remedy="Set cluster.hosts=1 or more."
        )
    if hosts > context:
        raise UserError(
            "more hosts than context tokens",
            given=f"{hosts} hosts for {context} tokens",
            allowed=f"1 to {context} hosts",
            remedy="Set a smaller cluster.hosts.",
        )
    size, extra = divmod(context, hosts)
    edges = [h * size + min(h, extra) for h in range(hosts + 1)]
    return list(itertools.pairwise(edges))
