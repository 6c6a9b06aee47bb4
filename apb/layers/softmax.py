"""Parts that layers with queries, keys and values by head share: their sizes, and attention to cached keys.

Shapes: B batch (1), S new tokens, T cached tokens, H query heads, K kv heads, D head dim, E value dim.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from apb.layers.base import ALL_HEADS, LayerKind
from apb.layers.call import AttentionCall
from apb.layers.rows import LayerKV
from burst.execution.blocks import Blocks
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator
from burst.kernels.soft_cap import capped
from burst.schedules import AttentionShape


@dataclass(frozen=True)
class Softmax(LayerKind):
    """Sizes of a layer with queries, keys and values by head.

    ``sink``: whether a learnt logit a head joins each softmax; ``soft_cap``: of scores; ``reads``: the mixer whose keys
    and values this one reads, which keeps none of its own.
    """

    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    sink: bool = False
    soft_cap: float | None = None
    reads: int | None = None

    @abstractmethod
    def reach(self, position: int) -> int:
        """Return the first position that the token at ``position`` sees."""

    def attention_shape(self, e: int) -> AttentionShape:
        return AttentionShape(
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.qk_dim,
            value_dim=self.v_dim,
            element_size=e,
            state_size=max(4, e),
            partial_size=e,
        )

    def query_bytes(self, e: int) -> int:
        return self.q_heads * self.qk_dim * e

    @property
    def heads(self) -> int:
        return self.q_heads

    @property
    def kv_dim(self) -> int:
        """Numbers of one token's keys and values."""
        return self.kv_heads * (self.qk_dim + self.v_dim)

    def row_bytes(self, e: int) -> int:
        return self.kv_dim * e

    @property
    def pair_flops(self) -> int:
        return 2 * (self.qk_dim + self.v_dim)

    def row_work_bytes(self, e: int) -> int:
        """q, k and v before and after RoPE, and two partial outputs in fp32."""
        given = self.q_heads * self.qk_dim + self.kv_dim
        return (2 * given + self.q_heads * self.v_dim) * e + 2 * self.q_heads * self.v_dim * 4

    @property
    def rotary_dim(self) -> int:
        return self.qk_dim

    def whole_row_bytes(self, e: int, exact: bool) -> int:
        """q, k and v; the output takes q's place where it is as wide, but not in attention over hosts."""
        out = self.q_heads * self.v_dim * e if self.qk_dim != self.v_dim else 0
        if exact:
            out = 2 * self.q_heads * self.v_dim * max(4, e)
        return (self.q_heads * self.qk_dim + self.kv_dim) * e + out

    def blocks(self, call: AttentionCall, kernel: Kernel, heads: slice = ALL_HEADS) -> Blocks:
        return Blocks(self.kernel(kernel), call.scale)

    def kernel(self, kernel: Kernel) -> Kernel:
        """Return the kernel with this layer's soft cap."""
        return kernel if self.soft_cap is None else capped(kernel, self.soft_cap)


def attend_cached(total: Accumulator, q_BHSD: Tensor, kv: LayerKV, kernel: Kernel, scale: float) -> None:
    """Attend to keys that every query sees. The heads of a group are rows of their kv head, so that a key is read once
    and not once a head: with few queries reading is all there is to it."""
    batch, heads, tokens, dim = q_BHSD.shape
    n_kv, wide = kv.k_BKTD.shape[1], kv.v_BKTE.shape[3]
    rows = q_BHSD.reshape(batch, n_kv, heads // n_kv * tokens, dim)
    out, lse = kernel(rows, kv.k_BKTD, kv.v_BKTE, causal=False, scale=scale)
    total.add(out.reshape(batch, heads, tokens, wide), lse.reshape(batch, heads, tokens))
