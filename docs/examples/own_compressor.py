"""Add a compressor of one's own: it passes on every third token of a block.

    python docs/examples/own_compressor.py [MODEL]

In this file the class is registered when it is defined. As a package of your own it needs an entry point as well, and
is then a choice of ``compress=``, in ``apb ask --help`` and in tests:

    [project.entry-points."apb.compress"]
    every_third = "my_package.every_third"

Shapes: B batch, K kv heads, S block tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from apb import Engine
from apb.compress.base import COMPRESSORS, Candidates, Compressor
from apb.strategies import strategy
from burst.registry import option

TEXT = "The ferry leaves at nine. The baker opens at six. The museum is closed on Mondays. " * 20


@COMPRESSORS.register("every_third", "every third token of a block")
@dataclass(frozen=True)
class EveryThird(Compressor):
    """Keeps every third token, counted from ``first``; ties go to the earlier token."""

    first: int = option(0, "the first token kept: 0, 1 or 2")

    def score(self, block: Candidates) -> Tensor:
        """Return scores (B, K, S), fp32; the highest are kept, as many as the strategy passes on."""
        k_BKSD = block.k_BKSD
        places_S = torch.arange(k_BKSD.shape[2], device=k_BKSD.device)
        return (places_S % 3 == self.first).float().expand(k_BKSD.shape[:-1])


def main(model: str = "smollm2-135m") -> str:
    """Print an answer that was found with every third row of each block; return it."""
    apb = strategy("apb", passing_len=100)
    with Engine.launch(model, cluster="virtual", hosts=3, strategy=apb, compress="every_third") as engine:
        handle = engine.prefill(context=TEXT, query="When does the ferry leave?")
        answer = engine.generate(handle, max_new_tokens=16)
        sys.stdout.write(f"{answer.text}\n{handle.metrics['compressor']}: {handle.metrics['bytes_by_kind']}\n")
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
