"""Rates of one device in the parts of a layer, at a model's own shapes.

Shapes: H query heads, K kv heads, S queries, T keys, D head dim, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional

from apb.compress.base import Candidates, Compressor, top_rows
from apb.layers.full import Full
from apb.layers.softmax import Softmax
from apb.models.placement import torch_dtype
from apb.plan.shapes import ModelShape
from bench.tools.timing import median_s
from burst.kernels import Kernel, kernel
from burst.kernels.merge import Accumulator

COPIED = 2**28  # bytes: far more than any cache holds


@dataclass(frozen=True)
class Device:
    """One device and number type, and a model's shape; every method returns seconds, or a rate a second."""

    shape: ModelShape
    dtype: str
    device: str
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.device == "cpu":
            torch.set_num_threads(1)

    def timed(self, work: Callable[[], object]) -> float:
        """Return the median seconds of a call."""
        with torch.inference_mode():
            return median_s(work, self.device, repeats=self.repeats)

    def random(self, *size: int) -> Tensor:
        """Return normal numbers on the device."""
        return torch.randn(*size, device=self.device).to(torch_dtype(self.dtype))

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second, read and written both counted, of a long copy."""
        source = torch.empty(COPIED, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return 2 * COPIED / self.timed(lambda: target.copy_(source))

    @cached_property
    def matrix_rate(self) -> float:
        """FLOP/s of one large square product."""
        n = 2048 if self.device == "cpu" else 8192
        a, b = self.random(n, n), self.random(n, n)
        return 2 * n**3 / self.timed(lambda: a @ b)

    @cache  # noqa: B019 - as long as the process: there is one device
    def linear(self, tokens: int) -> float:
        """``linear_rate``, measured once."""
        return self.linear_rate(tokens)

    @cache  # noqa: B019
    def causal(self, tokens: int) -> float:
        """FLOP/s of one causal call, measured once."""
        return self.attention_rate(tokens, tokens, causal=True)

    @cached_property
    def kernel(self) -> Kernel:
        """The fastest attention kernel here."""
        return kernel("auto", device=torch.device(self.device), dtype=torch_dtype(self.dtype))

    @cached_property
    def heads(self) -> Softmax:
        """Query heads, kv heads and dims of attention calls in the model's full layers, else in its windows.

        Keys and values that are made of latents are there for every query head.
        """
        s = self.shape
        kind = next(iter(s.sharded), None) or next(kind for kind in s.kinds if kind.heads)
        sizes = kind.attention_shape(s.element_size)
        kv_heads = sizes.q_heads if kind.expansion_flops else sizes.kv_heads
        return Full(sizes.q_heads, kv_heads, sizes.head_dim, sizes.value_dim)

    @cached_property
    def _weights(self) -> list[Tensor]:
        """One layer's projections, or what has as many parameters where experts take turns."""
        s, a = self.shape, self.heads
        attention = [(heads * dim, s.hidden) for heads, dim in ((a.q_heads, a.qk_dim), (a.kv_heads, a.qk_dim))]
        attention += [(a.kv_heads * a.v_dim, s.hidden), (s.hidden, a.q_heads * a.v_dim)]
        mlp = [(s.intermediate, s.hidden), (s.intermediate, s.hidden), (s.hidden, s.intermediate)]
        return [self.random(rows, columns) for rows, columns in (*attention, *mlp)]

    def linear_rate(self, tokens: int) -> float:
        """FLOP/s of one layer's projections for ``tokens`` tokens."""
        inputs = {width: self.random(tokens, width) for width in {w.shape[1] for w in self._weights}}
        weights = self._weights

        def layer() -> None:
            for weight in weights:
                functional.linear(inputs[weight.shape[1]], weight)

        return 2 * tokens * sum(w.numel() for w in weights) / self.timed(layer)

    def attention_rate(self, queries: int, keys: int, causal: bool) -> float:
        """FLOP/s of one kernel call; of a causal one only unmasked pairs count."""
        a = self.heads
        q = self.random(1, a.q_heads, queries, a.qk_dim)
        k, v = (self.random(1, a.kv_heads, keys, dim) for dim in (a.qk_dim, a.v_dim))
        pairs = queries * (queries + 1) // 2 if causal else queries * keys
        return a.pair_flops * a.q_heads * pairs / self.timed(lambda: self.kernel(q, k, v, causal=causal))

    def merge_s(self, tokens: int) -> float:
        """Seconds to merge one part into an accumulator of ``tokens`` queries."""
        a = self.heads
        out, part = (self.random(1, a.q_heads, tokens, a.v_dim).float() for _ in range(2))
        lse, part_lse = (self.random(1, a.q_heads, tokens).float() for _ in range(2))
        total = Accumulator()
        total.add(out, lse)
        return self.timed(lambda: total.add(part, part_lse))

    def merge_bytes(self, tokens: int) -> int:
        """Bytes that a merge must read and write: both parts' output and lse, and the result's."""
        return 3 * tokens * self.heads.q_heads * (self.heads.v_dim + 1) * 4

    def select_s(self, tokens: int, question: int, rows: int, compressor: Compressor) -> float:
        """Seconds to score ``tokens`` tokens by ``question`` query rows, and to gather the best ``rows``."""
        a = self.heads
        block = Candidates(
            layer=0,
            rank=0,
            q_BHSD=self.random(1, a.q_heads, tokens, a.qk_dim),
            k_BKSD=self.random(1, a.kv_heads, tokens, a.qk_dim),
            v_BKSD=self.random(1, a.kv_heads, tokens, a.v_dim),
            scale=a.qk_dim**-0.5,
            question_q_BHQD=self.random(1, a.q_heads, question, a.qk_dim),
            projections=None,
            start=0,
            end=tokens,
            rotate=lambda x, delta: x,
        )

        def select() -> Tensor:
            index = top_rows(compressor.score(block), rows, 0)
            found = [
                x.gather(2, index[..., None].expand(*index.shape, x.shape[3])) for x in (block.k_BKSD, block.v_BKSD)
            ]
            return torch.cat(found, dim=-1)

        return self.timed(select)

    def select_bytes(self, tokens: int, rows: int) -> int:
        """Bytes that a selection must read and write: all keys, and K and V of the chosen rows twice."""
        a, e = self.heads, self.shape.element_size
        return tokens * a.kv_heads * a.qk_dim * e + 2 * rows * a.row_bytes(e)

    def head_s(self, rows: int, tokens: int = 1) -> float:
        """Seconds of the LM head on ``rows`` of the vocabulary for ``tokens`` tokens."""
        weight, x = self.random(rows, self.shape.hidden), self.random(tokens, self.shape.hidden)
        return self.timed(lambda: functional.linear(x, weight))
