"""The probe at load: a model must do with attention what its kind promises, or it is rejected.

A short sequence runs with transformers' own attention, whose every call is compared with causal attention over all
tokens; then again with ours, which must leave the same hidden states; then three tokens at far positions show that
queries and keys are turned by RoPE alone. No family needs to be known by name for that.

Shapes: B batch (1), S tokens, H query heads, K kv heads, X either, D head dim, E hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from apb.attention.base import Attention
from apb.models.checks import PlainCall
from apb.models.chunked import KEYWORD
from apb.models.ends import Ends, learn_ends
from apb.models.hooks import FINAL, capturing
from apb.models.lengths import agreed
from apb.models.reference import Compared, narrowed, reference_attention
from apb.plan.shapes import ModelShape
from burst.errors import UserError

_TOKENS = 32  # of the sequence that is run; a big model on a CPU takes a second for it
_NEAR = 37  # positions between the first two tokens of the rotation's probe; far enough to turn most pairs


class Probed(Protocol):
    """The part of an adapter that the probe at load uses."""

    shape: ModelShape

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

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


class _Replayed:
    """Attention that answers as transformers' did: what a model makes of it must not depend on whose it is."""

    needs_projections = False

    def __init__(self, compared: Compared) -> None:
        self.seen: list[int] = []
        self._compared = compared

    def __call__(
        self, layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, projections: object
    ) -> Tensor:
        self.seen.append(layer)
        return self._compared.out_BSHD[min(len(self.seen), len(self._compared.out_BSHD)) - 1]


def probe(adapter: Probed, model: Any) -> Ends:
    """Reject a model that does not do with attention what distributed prefill does; raises UserError.

    All layers must ask for attention once and in order, with heads as in the configuration; transformers' own attention
    must be causal attention over all tokens; and rotated queries and keys must be those of another position when they
    are rotated on. Returns what stands round the decoder.
    """
    ids_S = _probe_ids(adapter)
    at_S = torch.arange(len(ids_S), device=adapter.device)
    compared = Compared()
    with torch.inference_mode():
        with reference_attention(model), _running(adapter), narrowed(model) as windows, capturing(()) as theirs:
            adapter.run(ids_S, at_S, compared)
        _check_calls(adapter, [layer for layer, *_ in compared.seen])
        for layer, *q_k_v in compared.seen:
            _check_heads(adapter, layer, q_k_v, len(ids_S))
        if compared.differing:
            maybe = f" (config.json says {', '.join(windows)})" if windows else ""
            raise _unfit(adapter, f"in layer {compared.differing[0]} attention is not causal over all tokens{maybe}")
        replayed = _Replayed(compared)
        with _running(adapter), capturing((0, FINAL)) as ours:
            adapter.run(ids_S, at_S, replayed)
        _check_calls(adapter, replayed.seen)
        if not bool(theirs.parts[FINAL].isfinite().all()):
            dtype = str(theirs.parts[FINAL].dtype).removeprefix("torch.")
            raise _unfit(
                adapter, f"a few tokens give numbers that are not finite in {dtype} (or its weights have some)"
            )
        if not _alike(ours.parts[FINAL], theirs.parts[FINAL]):
            raise _unfit(adapter, "what it computes depends on more than its attention's output")
        for length in {adapter.shape.max_positions, adapter.shape.rope_border or adapter.shape.max_positions}:
            with agreed(length):
                _check_rotation(adapter, length - 1)
        with _running(adapter):
            return learn_ends(model, ids_S, ours.parts[0], {KEYWORD: replayed})


def _probe_ids(adapter: Probed) -> Tensor:
    """Return token ids (S,) from all over the vocabulary, as unlike as it allows."""
    vocab = adapter.shape.vocab
    # Not from 0, which is often padding: a row of zeros, of which nothing can be learnt.
    step = max(1, vocab // _TOKENS)
    ids = [max((i * step + vocab // 2 + 1) % vocab, min(1, vocab - 1)) for i in range(_TOKENS)]
    return torch.tensor(ids, device=adapter.device)


def _check_rotation(adapter: Probed, far: int) -> None:
    shape, probe = adapter.shape, _Probe()
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
    except Exception as error:  # a model's own code raises what it likes; none of it can be prefilled
        raise _unfit(adapter, f"a few tokens could not be run ({error})") from error


def _alike(a_SE: Tensor, b_SE: Tensor) -> bool:
    """Return True where hidden states of two runs through the same operations differ by roundings alone."""
    tolerance = max(1e-3, 8 * torch.finfo(a_SE.dtype).eps) * float(b_SE.abs().max())
    return float((a_SE - b_SE).abs().max()) <= tolerance


def _unfit(adapter: Probed, why: str) -> UserError:
    return UserError(
        f"the model {adapter.name} cannot be prefilled over hosts: {why}",
        given=adapter.name,
        allowed="decoders whose layers take queries and keys from RoPE straight to causal attention",
        remedy="Choose a Llama-like decoder (Llama, Qwen, Mistral, Granite, Phi-3 and the like).",
    )
