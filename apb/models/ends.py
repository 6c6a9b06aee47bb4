"""The ends of a model, before its first layer and after its last norm: scales of embeddings and logits, bias and cap.

Families have these under many names and in many places, so they are learnt of the loaded model: its own forward gets
made-up hidden states in place of its decoder's, and what comes out is compared with the LM head's products.

Shapes: S tokens, N made-up rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from apb.draft.base import finished
from apb.models.classes import decoder

# Sizes of the made-up logits, from where no cap bends them to where every cap is all there is.
_SIZES = (0.25, 1.0, 4.0, 16.0, 64.0, 4096.0)
_SNAP = 1e-4  # relative; a learnt number this near to one of the configuration's is that one


@dataclass(frozen=True)
class Ends:
    """``logits = cap(logit_scale * (head @ hidden + bias))`` with ``cap(x) = soft_cap * tanh(x / soft_cap)``.

    ``embedding_scale``: what embedded tokens are multiplied with. A scale of None: the model does something else there.
    """

    embedding_scale: float | None = 1.0
    logit_scale: float | None = 1.0
    soft_cap: float | None = None

    def finish(self, products: Tensor) -> Tensor:
        """Return the logits of the head's products, the bias added."""
        assert self.logit_scale is not None
        return finished(products, self.logit_scale, self.soft_cap)


def learn_ends(model: Any, ids_S: Tensor, first_SE: Tensor, keywords: Mapping[str, Any]) -> Ends:
    """Return what stands round the decoder of a loaded model.

    ``first_SE``: what its first layer got of the tokens ``ids_S``; ``keywords``: those of a call of the whole model.
    """
    config, base = model.config, decoder(model)
    found = Ends(_embedding_scale(model.get_input_embeddings().weight, ids_S, first_SE, config), None)
    head = model.get_output_embeddings()
    if base is model or not isinstance(head, nn.Linear):
        return found
    hidden_NE = _made_up(head)
    with _replaced(base, hidden_NE):
        rows_N = torch.arange(len(hidden_NE), device=hidden_NE.device)
        out = model(input_ids=rows_N[None] % 2, use_cache=False, logits_to_keep=len(hidden_NE), **keywords)
    logits_NV, products_NV = out.logits[0].double(), head(hidden_NE).double()
    eps = torch.finfo(hidden_NE.dtype).eps
    for scale, soft_cap in _candidates(products_NV, logits_NV):
        scale = _snapped(scale, config)
        soft_cap = None if soft_cap is None else _snapped(soft_cap, config)
        mine_NV = finished(products_NV, scale, soft_cap)
        largest_N1 = logits_NV.abs().amax(-1, keepdim=True)
        if bool(((mine_NV - logits_NV).abs() <= max(1e-4, 8 * eps) * largest_N1).all()):
            return Ends(found.embedding_scale, scale, soft_cap)
    return found


def _embedding_scale(weight_WE: Tensor, ids_S: Tensor, first_SE: Tensor, config: Any) -> float | None:
    rows_SE, wide_SE = weight_WE[ids_S].double(), first_SE.double()
    if rows_SE.shape != wide_SE.shape:
        return None
    scale = _snapped(_fitted(rows_SE, wide_SE), config)
    eps = torch.finfo(first_SE.dtype).eps
    off = (rows_SE * scale - wide_SE).abs().max()
    return scale if float(off) <= max(1e-5, 2 * eps) * float(wide_SE.abs().max()) else None


def _made_up(head: nn.Linear) -> Tensor:
    """Return hidden states (N, E) whose products with the head have the sizes of ``_SIZES``."""
    weight_VE = head.weight
    rng = torch.Generator().manual_seed(0)
    row_E = torch.randn(weight_VE.shape[1], generator=rng, dtype=torch.float64)
    row_1E = row_E.to(device=weight_VE.device, dtype=torch.float32)[None]
    size = float((row_1E.to(weight_VE.dtype) @ weight_VE.T).double().square().mean().sqrt())
    sizes_N1 = torch.tensor(_SIZES, device=weight_VE.device)[:, None]
    return (row_1E * (sizes_N1 / max(size, 1e-12))).to(weight_VE.dtype)


class _Output(MoeModelOutputWithPast):
    """A decoder's output with nothing but hidden states; whatever else a model asks of it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def _replaced(base: nn.Module, hidden_NE: Tensor) -> Iterator[None]:
    """Let the decoder return these hidden states, whatever it is given."""
    before = base.__dict__.get("forward")
    base.forward = lambda *_, **__: _Output(last_hidden_state=hidden_NE[None])
    try:
        yield
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before


def _candidates(products_NV: Tensor, logits_NV: Tensor) -> Iterator[tuple[float, float | None]]:
    """Yield pairs of scale and soft cap that may be the model's."""
    yield _fitted(products_NV, logits_NV), None
    cap = float(logits_NV.abs().max())
    bent = logits_NV.abs() < 0.7 * cap
    if cap > 0 and bool(bent.any()):
        yield _fitted(products_NV[bent], torch.atanh(logits_NV[bent] / cap) * cap), cap


def _fitted(x: Tensor, y: Tensor) -> float:
    """Return the least-squares factor from ``x`` to ``y``; 0 where there is nothing to learn it of."""
    size = float((x * x).sum())
    return float((x * y).sum()) / size if size else 0.0


def _snapped(value: float, config: Any) -> float:
    """Return the number of the configuration, its inverse or root, that ``value`` is but for roundings."""
    numbers = [float(v) for v in vars(config).values() if isinstance(v, int | float) and v > 0]
    exact = [1.0, *numbers, *(1 / v for v in numbers), *(v**0.5 for v in numbers)]
    near = min(exact, key=lambda v: abs(v - value))
    return near if abs(near - value) <= _SNAP * abs(near) else value
