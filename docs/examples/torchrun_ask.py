"""Ask a question with torchrun's processes as hosts: gloo on CPUs, NCCL on GPUs.

    torchrun --nproc-per-node=2 docs/examples/torchrun_ask.py [MODEL]

Every process runs this file. Only rank 0 returns from ``Engine.launch``; the others serve it as hosts.
"""

from __future__ import annotations

import sys

from apb import Engine

TEXT = "The ferry leaves at nine. The baker opens at six. The museum is closed on Mondays. " * 20


def main(model: str = "smollm2-135m") -> None:
    """Print the answer, and how many hosts found it."""
    with Engine.launch(model, cluster="torchrun", strategy="apb") as engine:
        handle = engine.prefill(context=TEXT, query="When does the ferry leave?")
        answer = engine.generate(handle, max_new_tokens=16)
        sys.stdout.write(f"{answer.text}\n{engine.cluster.hosts} hosts\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
