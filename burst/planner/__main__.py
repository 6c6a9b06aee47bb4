"""``python -m burst.planner``: the fastest schedule for these tokens on these machines, and the reasons."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, replace

from burst.errors import UserError, in_range
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
        value = getattr(args, name)
        in_range("--" + name.replace("_", "-"), value, value is None or value >= 1, "1 or more")
    base = topology(args.ranks, args.nodes, args.machine).machine
    machine = replace(
        base,
        intra=Link(*_given((args.intra_bandwidth, args.intra_latency), astuple(base.intra))),
        inter=Link(*_given((args.inter_bandwidth, args.inter_latency), astuple(base.inter))),
        flops=base.flops if args.flops is None else args.flops,
    )
    shape = AttentionShape(
        q_heads=args.q_heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        value_dim=args.value_dim or args.head_dim,
        batch=args.batch,
        element_size=args.element_bytes,
        grad_size=args.grad_bytes,
        state_size=max(4, args.element_bytes),
        partial_size=args.element_bytes,
    )
    queries, keys = layout(args.layout, args.history or args.tokens, args.ranks), None
    if args.history:
        queries, keys = queries.extend(args.tokens)
    where = topology(args.ranks, args.nodes, machine)
    options = {"causal": not args.full, "window": args.window, "backward": args.backward}
    made = plan(queries, shape, where, keys=keys, **options)
    given = {"tokens": args.tokens, "history": args.history, "ranks": args.ranks, "nodes": args.nodes}
    return given | {"layout": args.layout} | made.to_dict(), made.table()


def _given(values: Iterable[float | None], defaults: Iterable[float]) -> Iterator[float]:
    return (default if value is None else value for value, default in zip(values, defaults, strict=True))


if __name__ == "__main__":
    sys.exit(run())
