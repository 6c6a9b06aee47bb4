"""``python -m bench.verify [check ...]``: the numbers that README claims, measured here."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

from bench.report import document, say
from bench.verify.runner import Recorder, conditions

CHECKS = {
    "burst": "distributed attention: exact, bytes as counted, precision, overhead, 200 faults (hours)",
    "full": "full attention equals transformers' greedy generate: 50 prompts, 64 tokens",
    "twins": "star, apb and spava equal their dense masked twins on virtual, gloo and ray; ledger = plan = formula",
    "needles": "160 needles in noise, 1k to 7k tokens, 4 and 8 hosts",
    "work": "own work of 8 hosts beside full attention at 7,300 tokens, one thread",
    "spava": "the same of spava's hosts: at most 0.66 together and 0.09 on the slowest",
    "chunks": "a longer block needs no more activation memory when it runs in chunks: full, star, apb, spava, ring",
    "speculation": "eagle2 and lookup give autoregressive decoding's tokens, greedy and sampled, over shards",
    "memory": "what a prefill adds to a gloo host process at 7,300 tokens, 8 hosts",
    "gpu": "the GPU path on one CUDA device: tests, kernels, 8 emulated hosts of an 8B shape at 128k, decode steps",
}


def main() -> int:
    """Run the checks asked for; exit 0 when all hold."""
    listed = "\n".join(f"  {name:11} {what}" for name, what in CHECKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.verify",
        description=__doc__,
        epilog=f"checks:\n{listed}\nA run that was stopped goes on from its file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checks", nargs="*", metavar="check", help="default: all that can run here")
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
    parser.add_argument("--data", nargs="*", default=[], metavar="FILE", help="JSONL questions for speculation, too")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSONL file of samples (default: bench/results/DATE-verify.jsonl); the summary goes beside it",
    )
    given = parser.parse_args()
    unknown = sorted(set(given.checks) - set(CHECKS))
    if unknown:
        parser.error(f"unknown checks {unknown}; choose from {', '.join(CHECKS)}")
    path = given.out or Path(__file__).parents[1] / "results" / f"{time.strftime('%Y-%m-%d')}-verify.jsonl"
    recorder = Recorder(path)
    say(f"samples go to {path}")
    results = {}
    if "gpu" in given.checks and not torch.cuda.is_available():
        parser.error("the check 'gpu' needs a CUDA device")
    here = [name for name in CHECKS if name != "gpu" or torch.cuda.is_available()]
    for name in given.checks or here:
        say(f"== {name}: {CHECKS[name]}")
        options = {"data": tuple(given.data)} if name == "speculation" else {}
        results[name] = importlib.import_module(f"bench.verify.{name}").check(recorder, given.model, **options)
        results[name]["commits"] = sorted({row["commit"] for row in recorder.rows(f"{name}/") if "commit" in row})
        say(f"== {name}: {'holds' if results[name]['ok'] else 'DOES NOT HOLD'}")
    summary = {"ok": all(r["ok"] for r in results.values()), "results": results, "conditions": conditions()}
    path.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    document(summary)
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
