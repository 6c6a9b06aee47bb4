"""Ring attention as a plain loop: one rank's forward, in the order of the paper, beside ``burst.attention``.

Source: Ring Attention, arXiv 2310.01889, algorithm 1. Blocks are merged by log-sum-exp.
Shapes: B batch, H query heads, K kv heads, S own tokens, D head dim.
"""

import math
import sys

import torch
from torch import Tensor

import burst
from burst.kernels import kernel
from burst.kernels.merge import Accumulator
from burst.layouts.layout import Layout
from burst.transport import Message, Transport


def ring(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, t: Transport, layout: Layout) -> Tensor:
    """Attend this rank's queries to the keys of all ranks, causally; P ranks take P steps and P - 1 hops."""
    attend, total = kernel("auto", q_BHSD.device, q_BHSD.dtype), Accumulator()
    total.add(torch.zeros_like(q_BHSD), torch.full(q_BHSD.shape[:3], -math.inf, dtype=q_BHSD.dtype))  # nothing seen
    block = torch.stack([k_BKSD, v_BKSD])  # keys and values travel as one message
    for step in range(t.world):
        source = (t.rank - step) % t.world  # the rank whose keys are here
        # 1. The block goes on to the next rank while this rank computes with it; the next block comes meanwhile.
        if step < t.world - 1:
            rows = layout.counts[(source - 1) % t.world]
            coming = block.new_empty(*block.shape[:3], rows, block.shape[4])
            to, by = (t.rank + 1) % t.world, (t.rank - 1) % t.world
            hop = t.exchange([Message(to, block)], [Message(by, coming)], kind="kv", step=f"hop {step}")
        # 2. Attention of the own queries over the block, in the pieces of the mask that hold any pair.
        for piece in layout.pieces(t.rank, source):
            k, v = block[:, :, :, piece.k]
            out_BHSD, lse_BHS = attend(q_BHSD[:, :, piece.q], k, v, causal=piece.causal)
            # 3. The running result and the block's are weighted by their shares of the softmax.
            total.add(out_BHSD, lse_BHS, piece.q)
        # 4. The next block is here once the hop is over.
        if step < t.world - 1:
            hop.wait()
            block = coming
    return total.finish(q_BHSD.dtype)[0]


def main(world: int = 4, n_tokens: int = 50) -> bool:
    """Say whether the loop and ``burst.attention`` agree bit by bit on every rank."""
    layout = burst.layout("zigzag", n_tokens, world)
    whole = [torch.randn(1, heads, n_tokens, 16) for heads in (4, 2, 2)]

    def rank(t: Transport) -> bool:
        q, k, v = (layout.shard(x, t.rank, 2) for x in whole)
        scheduled = burst.attention(q, k, v, transport=t, layout=layout, schedule="ring")
        return torch.equal(ring(q, k, v, t, layout), scheduled)

    return all(burst.run_virtual(world, rank))


if __name__ == "__main__":
    sys.exit(0 if main() else "the loop and burst.attention differ")
