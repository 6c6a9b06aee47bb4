"""``python -m burst.planner``: which schedule for these tokens on these machines, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from burst.errors import UserError
from burst.layouts.layout import layout
from burst.planner.planner import plan
from burst.planner.topology import Link, topology
from burst.schedules import AttentionShape


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m burst.planner", description=__doc__)
    p.add_argument("--tokens", type=int, required=True, help="tokens of the sequence, or of the new chunk")
    p.add_argument("--history", type=int, default=0, help="tokens whose keys and values are there already")
    p.add_argument("--ranks", type=int, required=True)
    p.add_argument("--nodes", type=int, default=1, help="machines that the ranks are spread over")
    p.add_argument("--layout", default="zigzag", help="contiguous, striped or zigzag")
    p.add_argument("--q-heads", type=int, default=32)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--value-dim", type=int, help="the head dim when left out")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--element-bytes", type=int, default=2, help="bytes of an activation: 2 for bf16")
    p.add_argument("--grad-bytes", type=int, default=4, help="bytes of a travelling gradient")
    p.add_argument("--window", type=int, help="keys that a query sees, its own included")
    p.add_argument("--full", action="store_true", help="no causal mask")
    p.add_argument("--backward", action="store_true", help="plan the backward as well")
    p.add_argument("--machine", default="cuda", help="speeds to start from: cpu or cuda")
    p.add_argument("--flops", type=float, help="attention kernel, FLOP/s")
    p.add_argument("--intra-bandwidth", type=float, help="bytes/s inside a node")
    p.add_argument("--inter-bandwidth", type=float, help="bytes/s between nodes")
    p.add_argument("--intra-latency", type=float, help="seconds")
    p.add_argument("--inter-latency", type=float, help="seconds")
    return p


def run(arguments: Sequence[str] | None = None) -> int:
    """Write the table and, as the last line, the JSON document to stdout; 0, or 2 for a user's mistake."""
    args = _parser().parse_args(arguments)
    try:
        document, table = _plan(args)
    except UserError as error:
        fields = {"given": str(error.given), "allowed": str(error.allowed), "remedy": error.remedy}
        sys.stderr.write(f"{error}\n")
        sys.stdout.write(json.dumps({"error": {"type": "UserError", "message": error.message} | fields}) + "\n")
        return 2
    sys.stdout.write(table)
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def _plan(args: argparse.Namespace) -> tuple[dict[str, object], str]:
    for name in ("q_heads", "kv_heads", "head_dim", "value_dim", "batch", "element_bytes", "grad_bytes"):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and value < 1:
            raise UserError(f"{option} must be positive", given=value, allowed="1 or more", remedy=f"Change {option}.")
    base = topology(args.ranks, args.nodes, args.machine).machine
    links = {}
    for name in ("intra", "inter"):
        old: Link = getattr(base, name)
        bandwidth, latency = getattr(args, f"{name}_bandwidth"), getattr(args, f"{name}_latency")
        links[name] = Link(
            old.bandwidth if bandwidth is None else bandwidth, old.latency if latency is None else latency
        )
    machine = replace(
        base,
        intra=links["intra"],
        inter=links["inter"],
        flops=base.flops if args.flops is None else args.flops,
    )
    shape = AttentionShape(
        q_heads=args.q_heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        value_dim=args.head_dim if args.value_dim is None else args.value_dim,
        batch=args.batch,
        element_size=args.element_bytes,
        grad_size=args.grad_bytes,
        state_size=max(4, args.element_bytes),
        partial_size=args.element_bytes,
    )
    queries, keys = layout(args.layout, args.history or args.tokens, args.ranks), None
    if args.history:
        queries, keys = queries.extend(args.tokens)
    made = plan(
        queries,
        shape,
        topology(args.ranks, args.nodes, machine),
        causal=not args.full,
        window=args.window,
        keys=keys,
        backward=args.backward,
    )
    given = {"tokens": args.tokens, "history": args.history, "ranks": args.ranks, "nodes": args.nodes}
    return given | {"layout": args.layout} | made.to_dict(), made.table()


if __name__ == "__main__":
    sys.exit(run())
