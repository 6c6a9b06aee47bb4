"""transformers' own attention of a model, looked at while it runs: each call is compared with its layer's kind.

Shapes: B batch (1), S tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from apb.layers.base import LayerKind
from apb.layers.call import AttentionCall, Call
from apb.layers.latent import Latent
from apb.layers.softmax import Softmax
from apb.layers.window import Window
from apb.models.checks import PlainCall, check_keywords
from apb.models.kinds import MIXER, Mixer
from apb.models.latents import expansion, own_expansion
from apb.models.linear_probe import plainly
from burst.execution.blocks import add_sinks
from burst.kernels.reference import attend

REFERENCE = "apb-reference"

NARROW = 8  # tokens; what a wider window is narrowed to meanwhile
_SPREAD = 6.0  # of the made-up scores: soft caps bend them, and still every row sees more than its largest
_TOLERANCE = 1e-3  # of outputs of size 1, in fp32
# Names of what may be a window. Published ones are far wider than what can be run at every load (Phi-MoE's 2,047): as
# they are read when masks are made, from the configuration or the modules, a narrower one is put there for the probe.
_MAYBE_WINDOW = re.compile(r"window|chunk|local|span|stride|block")
_NO_WINDOW = re.compile(r"layer|feed_forward|head|_type")


class Compared:
    """transformers' own attention of a model, each call compared with its kind's; keeps what it was given and returned,
    by call."""

    needs_projections = False

    def __init__(self, narrow: bool) -> None:
        """``narrow``: whether windows are narrowed meanwhile."""
        self.calls: list[Call] = []
        self.outs: list[Tensor] = []
        self.differing: list[int] = []
        self._narrow = narrow

    def __call__(self, call: Call) -> Tensor:
        """Run a linear layer's call plainly; attention goes through ``compare``."""
        self.calls.append(call)
        self.outs.append(plainly(call))
        return self.outs[-1]

    def compare(
        self, module: nn.Module, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSE: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        """Return the output (B, S, H, E) of the model's own function, compared on made-up inputs of the same shapes."""
        mixer: Mixer = getattr(module, MIXER)
        scaling = options["scaling"]
        scale = scaling if scaling is not None else q_BHSD.shape[-1] ** -0.5
        by = expansion(module) if isinstance(mixer.kind, Latent) else None
        given = (q_BHSD.clone(), k_BKSD.clone(), v_BKSE.clone())
        call = AttentionCall(mixer.number, *given, scale, options.get("s_aux"), latent=by)
        self.calls.append(call)

        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if by is not None:
                k, v = _in_type(q.dtype, own_expansion(module, *_in_type(by.weight_HXR.dtype, (k, v))))
            out: Tensor = _own_function(module)(module, q, k, v, mask, **options)[0]
            return out

        # Trained scores may be so sharp that a window changes next to nothing in 32 tokens; made-up ones are not.
        q, k, v = (_noise(x, i) for i, x in enumerate((q_BHSD, k_BKSD, v_BKSE)))
        q = q * (_SPREAD / (scale * q_BHSD.shape[-1] ** 0.5))
        theirs = own(q, k, v)
        ours = self._dense(mixer.kind, dataclasses.replace(call, q_BHSD=q, k_BKSD=k, v_BKSE=v))
        if theirs.shape != ours.shape or not float((theirs - ours).abs().max()) < _TOLERANCE:
            self.differing.append(mixer.number)
        out = own(q_BHSD, k_BKSD, v_BKSE)
        self.outs.append(out)
        return out

    def _dense(self, kind: LayerKind, call: AttentionCall) -> Tensor:
        """Return what a layer of this kind is to answer, (B, S, H, E), in plain softmax."""
        q, k, v, cap = call.q_BHSD, call.k_BKSD, call.v_BKSE, None
        at_S = torch.arange(call.tokens, device=q.device)
        reach_S = torch.zeros_like(at_S)
        if call.latent is not None:
            k, v = _in_type(q.dtype, call.latent.expand(*_in_type(call.latent.weight_HXR.dtype, (k, v))))
        else:
            assert isinstance(kind, Softmax)
            if self._narrow and isinstance(kind, Window):
                kind = dataclasses.replace(kind, window=min(kind.window, NARROW))
            reach_S, cap = torch.tensor([kind.reach(p) for p in range(call.tokens)], device=q.device), kind.soft_cap
        seen_SS = (at_S <= at_S[:, None]) & (at_S >= reach_S[:, None])
        out, lse = attend(q, k, v, False, call.scale, seen_ST=seen_SS, soft_cap=cap)
        if call.sinks_H is not None:
            add_sinks(out, lse, call.sinks_H)
        return out.transpose(1, 2)


def _reference(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    apb_attention: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention hook while the probe runs."""
    check_keywords(module, {"dropout": dropout, **others})
    if not isinstance(apb_attention, Compared) or not hasattr(module, MIXER):
        raise PlainCall(
            "the model lost a keyword on the way to its attention",
            given="a call without apb_attention",
            allowed="layers that hand keywords on",
            remedy="Choose another model.",
        )
    options = {"scaling": scaling, "dropout": dropout, **others}
    return apb_attention.compare(module, query, key, value, attention_mask, options), None


AttentionInterface.register(REFERENCE, _reference)
AttentionMaskInterface.register(REFERENCE, eager_mask)


@contextlib.contextmanager
def reference_attention(model: Any) -> Iterator[None]:
    ours = model.config._attn_implementation
    model.set_attn_implementation(REFERENCE)
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


@contextlib.contextmanager
def narrowed(model: Any) -> Iterator[list[str]]:
    """Put a narrow window wherever configuration and modules name a wide one; yields what the configuration says."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    places = [*configs, *model.modules()]
    found = [
        (place, name, value)
        for place in places
        for name, value in list(vars(place).items())
        if type(value) is int and value > NARROW and not name.startswith("_")
        if _MAYBE_WINDOW.search(name) and not _NO_WINDOW.search(name)
    ]
    for place, name, _ in found:
        setattr(place, name, NARROW)
    try:
        yield sorted({f"{name}={value}" for place, name, value in found if not isinstance(place, nn.Module)})
    finally:
        for place, name, value in found:
            setattr(place, name, value)


def _own_function(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Any]] = own or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return function


def _in_type(dtype: torch.dtype, xs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return both in a type: made-up inputs are fp32, the matrix that expands latents is the model's."""
    return xs[0].to(dtype), xs[1].to(dtype)


def _noise(x: Tensor, seed: int) -> Tensor:
    """Return normal noise of a tensor's shape, fp32 (fp64 for fp64)."""
    rng = torch.Generator().manual_seed(seed)
    made = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    return made.to(device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
