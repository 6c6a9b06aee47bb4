"""transformers' own attention of a model, looked at while it runs: each call is compared with causal attention.

Shapes: B batch (1), S tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from apb.models.checks import PlainCall, check_keywords

REFERENCE = "apb-reference"

_WINDOW = 8  # tokens; what a wider window is narrowed to meanwhile
_SPREAD = 6.0  # of the made-up scores: soft caps bend them, and still every row sees more than its largest
_TOLERANCE = 1e-3  # of outputs of size 1, in fp32
# Names of what may be a window. Published ones are far wider than what can be run at every load (Phi-MoE's 2,047): as
# they are read when masks are made, from the configuration or the modules, a narrower one is put there for the probe.
_MAYBE_WINDOW = re.compile(r"window|chunk|local|span|stride|block")
_NO_WINDOW = re.compile(r"layer|feed_forward|head|_type")


class Compared:
    """transformers' own attention of a model, each call compared with ours; keeps what it returned, by call."""

    needs_projections = False

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.out_BSHD: list[Tensor] = []
        self.differing: list[int] = []

    def __call__(
        self, layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, projections: object
    ) -> Tensor:
        raise AssertionError("transformers' own attention is called")

    def compare(
        self, module: nn.Module, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        """Return the output (B, S, H, D) of the model's own function, compared on made-up inputs of the same shapes."""
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.seen.append((layer, q_BHSD, k_BKSD, v_BKSD))
        own = _own_function(module)
        # Trained scores may be so sharp that a window changes next to nothing in 32 tokens; made-up ones are not.
        scaling = options["scaling"]
        scale = scaling if scaling is not None else q_BHSD.shape[-1] ** -0.5
        made = [_noise(x, i) for i, x in enumerate((q_BHSD, k_BKSD, v_BKSD))]
        made[0] = made[0] * (_SPREAD / (scale * q_BHSD.shape[-1] ** 0.5))
        q, k, v = made
        theirs_BSHD = own(module, q, k, v, mask, **options)[0]
        ours_BSHD = _causal(q, k, v, scale)
        if theirs_BSHD.shape != ours_BSHD.shape or not float((theirs_BSHD - ours_BSHD).abs().max()) < _TOLERANCE:
            self.differing.append(layer)
        out_BSHD: Tensor = own(module, q_BHSD, k_BKSD, v_BKSD, mask, **options)[0]
        self.out_BSHD.append(out_BSHD)
        return out_BSHD


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
    if not isinstance(apb_attention, Compared):
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
        if type(value) is int and value > _WINDOW and not name.startswith("_")
        if _MAYBE_WINDOW.search(name) and not _NO_WINDOW.search(name)
    ]
    for place, name, _ in found:
        setattr(place, name, _WINDOW)
    try:
        yield sorted({f"{name}={value}" for place, name, value in found if not isinstance(place, nn.Module)})
    finally:
        for place, name, value in found:
            setattr(place, name, value)


def _own_function(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Any]] = own or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return function


def _noise(x: Tensor, seed: int) -> Tensor:
    """Return normal noise of a tensor's shape, fp32 (fp64 for fp64)."""
    rng = torch.Generator().manual_seed(seed)
    made = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    return made.to(device=x.device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _causal(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> Tensor:
    """Return causal attention over all tokens, (B, S, H, D)."""
    group, tokens = q_BHSD.shape[1] // k_BKSD.shape[1], q_BHSD.shape[2]
    k_BHSD, v_BHSD = (x.repeat_interleave(group, dim=1) for x in (k_BKSD, v_BKSD))
    future_SS = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHSD.device).triu(1)
    scores_BHSS = (q_BHSD @ k_BHSD.transpose(2, 3) * scale).masked_fill(future_SS, -torch.inf)
    return (scores_BHSS.softmax(-1) @ v_BHSD).transpose(1, 2)
