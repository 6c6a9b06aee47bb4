"""The probe at load: a model must do with attention what its kind promises, or it is rejected.

A short sequence runs with transformers' own attention, whose every call is compared with causal attention over all
tokens; then again with ours, which must leave the same hidden states; then three tokens at far positions show that
queries and keys are turned by RoPE alone. No family needs to be known by name for that.

Shapes: B batch (1), S tokens, H query heads, K kv heads, D head dim, E hidden size.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from apb.attention.base import Attention
from apb.models.checks import PlainCall, check_keywords
from apb.models.chunked import KEYWORD
from apb.models.ends import Ends, learn_ends
from apb.models.hooks import FINAL, capturing
from apb.plan.shapes import ModelShape
from burst.errors import UserError

REFERENCE = "apb-reference"  # transformers' own attention, looked at

_TOKENS = 32  # of the sequence that is run; a big model on a CPU takes a second for it
_WINDOW = 8  # tokens; what a wider window is narrowed to meanwhile
_NEAR = 37  # positions between the first two tokens of the rotation's probe; far enough to turn most pairs
_SPREAD = 6.0  # of the made-up scores: soft caps bend them, and still every row sees more than its largest
# Names of what may be a window. Published ones are far wider than what can be run at every load (Phi-MoE's 2,047): as
# they are read when masks are made, from the configuration or the modules, a narrower one is put there for the probe.
_MAYBE_WINDOW = re.compile(r"window|chunk|local|span|stride|block")
_NO_WINDOW = re.compile(r"layer|feed_forward|head|_type")


class Probed(Protocol):
    """The part of an adapter that the probe at load uses."""

    shape: ModelShape

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def run(self, ids_S: Tensor, positions_S: Tensor, attention: Attention) -> None: ...

    def rotate(self, x_BHSD: Tensor, delta: int, layer: int) -> Tensor: ...


class _Probe:
    """Attention that keeps what it is given and lets no token see another."""

    needs_projections = False

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def __call__(
        self, layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, projections: object
    ) -> Tensor:
        self.seen.append((layer, q_BHSD, k_BKSD, v_BKSD))
        return v_BKSD.repeat_interleave(q_BHSD.shape[1] // v_BKSD.shape[1], dim=1).transpose(1, 2)


class _Compared:
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
        if theirs_BSHD.shape != ours_BSHD.shape or not float((theirs_BSHD - ours_BSHD).abs().max()) < 1e-3:
            self.differing.append(layer)
        out_BSHD: Tensor = own(module, q_BHSD, k_BKSD, v_BKSD, mask, **options)[0]
        self.out_BSHD.append(out_BSHD)
        return out_BSHD


class _Replayed:
    """Attention that answers as transformers' did: what a model makes of it must not depend on whose it is."""

    needs_projections = False

    def __init__(self, compared: _Compared) -> None:
        self.seen: list[int] = []
        self._compared = compared

    def __call__(
        self, layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, projections: object
    ) -> Tensor:
        self.seen.append(layer)
        return self._compared.out_BSHD[min(len(self.seen), len(self._compared.out_BSHD)) - 1]


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
    if not isinstance(apb_attention, _Compared):
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


def probe(adapter: Probed, model: Any) -> Ends:
    """Reject a model that does not do with attention what distributed prefill does; raises UserError.

    All layers must ask for attention once and in order, with heads as in the configuration; transformers' own attention
    must be causal attention over all tokens; and rotated queries and keys must be those of another position when they
    are rotated on. Returns what stands round the decoder.
    """
    ids_S = _probe_ids(adapter)
    at_S = torch.arange(len(ids_S), device=adapter.device)
    compared = _Compared()
    with torch.inference_mode():
        with _reference_attention(model), _running(adapter), _narrowed(model) as narrowed, capturing(()) as theirs:
            adapter.run(ids_S, at_S, compared)
        _check_calls(adapter, [layer for layer, *_ in compared.seen])
        for layer, *q_k_v in compared.seen:
            _check_heads(adapter, layer, q_k_v, len(ids_S))
        if compared.differing:
            maybe = f" (config.json says {', '.join(narrowed)})" if narrowed else ""
            raise _unfit(adapter, f"in layer {compared.differing[0]} attention is not causal over all tokens{maybe}")
        replayed = _Replayed(compared)
        with _running(adapter), capturing((0, FINAL)) as ours:
            adapter.run(ids_S, at_S, replayed)
        _check_calls(adapter, replayed.seen)
        if not _alike(ours.parts[FINAL], theirs.parts[FINAL]):
            raise _unfit(adapter, "what it computes depends on more than its attention's output")
        _check_rotation(adapter)
        with _running(adapter):
            return learn_ends(model, ids_S, ours.parts[0], {KEYWORD: replayed})


@contextlib.contextmanager
def _reference_attention(model: Any) -> Iterator[None]:
    ours = model.config._attn_implementation
    model.set_attn_implementation(REFERENCE)
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def _probe_ids(adapter: Probed) -> Tensor:
    """Return token ids (S,) from all over the vocabulary, as unlike as it allows."""
    vocab = adapter.shape.vocab
    # Not from 0, which is often padding: a row of zeros, of which nothing can be learnt.
    step = max(1, vocab // _TOKENS)
    ids = [max((i * step + vocab // 2 + 1) % vocab, min(1, vocab - 1)) for i in range(_TOKENS)]
    return torch.tensor(ids, device=adapter.device)


def _check_rotation(adapter: Probed) -> None:
    shape, probe = adapter.shape, _Probe()
    far = shape.max_positions - 1
    distances = sorted({min(_NEAR, far), far})
    ids_S = torch.full((1 + len(distances),), shape.vocab // 2, device=adapter.device)
    with _running(adapter):
        adapter.run(ids_S, torch.tensor([0, *distances], device=adapter.device), probe)
        for layer, q_BHSD, k_BKSD, _ in probe.seen:
            for x_BXSD in (q_BHSD, k_BKSD):
                for row, distance in enumerate(distances, 1):
                    mine, theirs = adapter.rotate(x_BXSD[:, :, :1], distance, layer), x_BXSD[:, :, row : row + 1]
                    # 8 roundings in low precision; in fp32 the angles themselves are known to some 1e-5.
                    tolerance = max(1e-3, 8 * torch.finfo(theirs.dtype).eps) * float(theirs.abs().max())
                    if not float((mine - theirs).abs().max()) <= tolerance:
                        raise _unfit(
                            adapter, f"in layer {layer} positions are not RoPE alone (a norm may come after it)"
                        )


def _check_calls(adapter: Probed, layers: list[int]) -> None:
    if layers != list(range(adapter.shape.layers)):
        raise _unfit(adapter, f"attention was asked for by layers {layers}")


def _check_heads(adapter: Probed, layer: int, q_k_v: list[Tensor], tokens: int) -> None:
    s = adapter.shape
    for x, heads in zip(q_k_v, (s.q_heads, s.kv_heads, s.kv_heads), strict=True):
        wanted = (1, heads, tokens, s.head_dim)
        if x.shape != wanted:
            raise _unfit(adapter, f"layer {layer} has heads of {tuple(x.shape)}, not {wanted}")


@contextlib.contextmanager
def _running(adapter: Probed) -> Iterator[None]:
    """Turn what goes wrong while the model runs into the error that rejects it."""
    try:
        yield
    except PlainCall as error:
        raise _unfit(adapter, "its layers do not hand attention's keywords on") from error
    except (UserError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError) as error:
        raise _unfit(adapter, f"a few tokens could not be run ({error})") from error


@contextlib.contextmanager
def _narrowed(model: Any) -> Iterator[list[str]]:
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


def _alike(a_SE: Tensor, b_SE: Tensor) -> bool:
    """Whether hidden states of two runs through the same operations are the same, but for a rounding or two."""
    tolerance = max(1e-3, 8 * torch.finfo(a_SE.dtype).eps) * float(b_SE.abs().max())
    return float((a_SE - b_SE).abs().max()) <= tolerance


def _unfit(adapter: Probed, why: str) -> UserError:
    return UserError(
        f"the model {adapter.name} cannot be prefilled over hosts: {why}",
        given=adapter.name,
        allowed="decoders whose layers take queries and keys from RoPE straight to causal attention",
        remedy="Choose a Llama-like decoder (Llama, Qwen, Mistral, Granite, Phi-3 and the like).",
    )
