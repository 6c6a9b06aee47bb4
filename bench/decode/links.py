"""Trees against chains over links: measured lengths and compute, modelled exchanges.

A step takes the draft's and the verification's own compute, both measured, and one exchange a layer whose context is
sharded: its latency, and the partial outputs of every row over the bandwidth. Sizes are free: each shape takes the size
that is fastest there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apb.plan.shapes import ModelShape

GBIT = 1e9 / 8
HOSTS = 8  # among which exchanges are modelled, whatever the compute was measured on
LINKS = {  # bytes a second into a host, seconds of an exchange
    "1 Gb/s, 100 us": (1 * GBIT, 100e-6),
    "10 Gb/s, 50 us": (10 * GBIT, 50e-6),
    "100 Gb/s, 20 us": (100 * GBIT, 20e-6),
    "3,600 Gb/s, 10 us": (3600 * GBIT, 10e-6),
}


def step_s(line: dict[str, Any], shape: ModelShape, bandwidth: float, latency: float) -> float:
    """Return the modelled seconds of a step of a decoder whose summary is ``line``."""
    partials = (HOSTS - 1) * line["rows_per_step"] * shape.partial_bytes
    return float(line["work_per_step_s"] + sum(shape.sharded.values()) * latency + partials / bandwidth)


def winners(lines: Sequence[dict[str, Any]], shape: ModelShape) -> list[dict[str, Any]]:
    """Return, for every context length and link, the fastest tree, the fastest chain, and plain decoding.

    ``lines``: summaries of one model over all kinds, by context and decoder.
    """
    found = []
    for context in sorted({line["context"] for line in lines}):
        here = [line for line in lines if line["context"] == context]
        for name, (bandwidth, latency) in LINKS.items():
            speed = {x["decoder"]: x["accepted_length"] / step_s(x, shape, bandwidth, latency) for x in here}
            trees, chains = ([x["decoder"] for x in here if x["shape"] == s] for s in ("tree", "chain"))
            if not trees or not chains:
                continue
            tree, chain = max(trees, key=speed.__getitem__), max(chains, key=speed.__getitem__)
            found.append(
                {
                    "context": context,
                    "link": name,
                    "hosts": HOSTS,
                    "tree": tree,
                    "tree_tokens_per_s": speed[tree],
                    "chain": chain,
                    "chain_tokens_per_s": speed[chain],
                    "plain_tokens_per_s": speed["autoregressive"],
                    "faster": "tree" if speed[tree] > speed[chain] else "chain",
                }
            )
    return found
