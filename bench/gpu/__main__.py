"""``python -m bench.gpu``: tests, kernels, 8 emulated hosts of an 8B shape at 128k tokens, decode steps."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.gpu.check import check
from bench.gpu.parts import PARTS
from bench.tools.conditions import conditions
from bench.tools.output import dated, document, say
from bench.tools.rows import RowStore


def main() -> int:
    """Run the check; exit 0 when all of it holds."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, epilog="A run that was stopped goes on from its file."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=dated("gpu.jsonl"),
        help="JSONL file of samples (default: bench/results/DATE-gpu.jsonl); the summary goes beside it",
    )
    parser.add_argument("--part", choices=PARTS, help="measure only this and print it")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    if given.part:
        document(PARTS[given.part]())
        return 0
    say(f"samples go to {given.out}")
    found = check(RowStore(given.out))
    summary = {**found, "conditions": conditions()}
    given.out.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    document(summary)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
