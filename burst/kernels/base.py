"""What a block kernel is, and the checks and special cases that all of them share.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from burst.errors import UserError
from burst.merge import accumulate_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# q, k, v, causal, scale -> out, lse. Called with at least one query and one key, checked and unit-strided.
Block = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


class Kernel(Protocol):
    """Softmax attention of one block of queries over one block of keys, with its log-sum-exp."""

    @property
    def name(self) -> str: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend q (B, H, S, D) to k (B, K, T, D) and v (B, K, T, E), where K divides H.

        Returns ``out`` (B, H, S, E) in q's dtype and ``lse`` (B, H, S), natural log with the scale included,
        in fp32 (fp64 for fp64 inputs). Without keys ``out`` is 0 and ``lse`` -inf. ``causal`` is for square
        blocks (S == T) only: backends disagree about the corner of the others, which are composed by merging
        instead. ``scale`` is 1/sqrt(D) when None. Raises UserError when shapes, dtypes, devices or the scale
        do not fit.
        """
        ...


@dataclass(frozen=True)
class Checked:
    """A backend behind the checks and special cases that backends do not agree on; see ``Kernel``.

    ``device`` is the only device type the backend runs on, None for any; ``any_value_dim`` says whether E may
    differ from D.
    """

    name: str
    block: Block
    device: str | None = None
    any_value_dim: bool = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check(q, k, v, causal, scale)
        if q.shape[:3].numel() == 0 or k.shape[2] == 0:  # the CPU op divides by zero here and kills the process
            lse_BHS = q.new_full(q.shape[:3], -math.inf, dtype=accumulate_dtype(q.dtype))
            return q.new_zeros((*q.shape[:3], v.shape[3])), lse_BHS
        # The CPU op reads a strided last dim as if it were dense: wrong numbers, no error.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return self.block(q, k, v, causal, q.shape[3] ** -0.5 if scale is None else scale)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> None:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if not q.dim() == k.dim() == v.dim() == 4:
            self._refuse("q, k and v need 4 dims", shapes, "(batch, heads, tokens, head dim)", "Reshape them.")
        if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
            given = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
            self._refuse("q, k and v need one float dtype", given, ", ".join(map(str, DTYPES)), "Cast them.")
        if not q.device == k.device == v.device or self.device not in (None, q.device.type):
            given = f"q {q.device}, k {k.device}, v {v.device}"
            remedy = "Move the tensors, or choose the kernel 'auto'."
            self._refuse("the inputs' device does not fit", given, self.device or "one device", remedy)
        batch, heads, length, dim = q.shape
        if k.shape[:3] != v.shape[:3] or k.shape[0] != batch:
            self._refuse("k and v do not belong together, or not to q", shapes, "one batch size", "Check k and v.")
        if k.shape[1] == 0 or heads % k.shape[1]:
            remedy = "Pass k and v unrepeated, with a number of kv heads that divides the query heads."
            self._refuse("heads do not group", f"{heads} over {k.shape[1]} kv heads", "a whole ratio", remedy)
        if k.shape[3] != dim or dim == 0:
            self._refuse("q and k differ in head dim", shapes, "one head dim, 1 or more", "Check the projections.")
        if v.shape[3] != dim and not self.any_value_dim:
            remedy = "Choose the kernel 'reference', or pad v with zeros and cut the output."
            self._refuse("the value dim must equal the head dim", shapes, f"value dim {dim}", remedy)
        if causal and length != k.shape[2]:
            remedy = "Attend to the earlier keys with causal=False and merge the two parts."
            self._refuse("causal needs a square block", f"{length} x {k.shape[2]}", "S == T", remedy)
        if scale is not None and not 0 < scale < math.inf:
            self._refuse("the scale must be positive", scale, "0 < scale < inf", "Leave it None for 1/sqrt(D).")

    def _refuse(self, message: str, given: object, allowed: object, remedy: str) -> NoReturn:
        raise UserError(f"kernel '{self.name}': {message}", given=given, allowed=allowed, remedy=remedy)
