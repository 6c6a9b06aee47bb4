"""The probe at load: a model must do with its mixers what their kinds promise, or it is rejected.

A short sequence runs with transformers' own attention, whose every call is compared with its layer's kind; then again
in two pieces with the same outputs played back, in which every layer must ask for the same and leave the same hidden
states, so that nothing but the positions it is given says where a piece stands; then three tokens at far positions show
which layers turn queries and keys by RoPE alone. No family needs to be known by name for that.

Shapes: B batch (1), S tokens, H query heads, K kv heads, X either, D head dim, E hidden size.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from apb.attention.base import Attention
from apb.layers.call import AttentionCall, Call
from apb.layers.linear import Linear
from apb.models.checks import PlainCall
from apb.models.ends import Ends, learn_ends
from apb.models.hooks import FINAL, KEYWORD, capturing
from apb.models.lengths import agreed
from apb.models.linear_probe import by_itself, unlike
from apb.models.reference import Compared, narrowed, reference_attention
from apb.models.rotation import Rotation
from apb.plan.shapes import ModelShape
from burst.errors import UserError

_TOKENS = 32  # of the sequence that is run; a big model on a CPU takes a second for it
_CUT = 20  # where the second piece of it begins
_ALONE = (11, 22, 31)  # tokens that run alone as well: what joins neighbours, a short convolution say, changes each
_NEAR = 37  # positions between the first two tokens of the rotation's probe; far enough to turn most pairs
_MOST = 0.5  # of the tokens must be alike: a rounding may send some of them to other experts


class Probed(Protocol):
    """The part of an adapter that the probe at load uses."""

    shape: ModelShape

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def run(self, ids_S: Tensor, positions_S: Tensor, attention: Attention) -> None: ...


class _Probe:
    """Attention that keeps what it is given and lets no token see another."""

    needs_projections = False

    def __init__(self) -> None:
        self.seen: list[AttentionCall] = []

    def __call__(self, call: Call) -> Tensor:
        if not isinstance(call, AttentionCall):
            return by_itself(call)
        self.seen.append(call)
        v_BKSE = call.v_BKSE if call.latent is None else call.latent.expand(call.k_BKSD, call.v_BKSE)[1]
        return v_BKSE.repeat_interleave(call.q_BHSD.shape[1] // v_BKSE.shape[1], dim=1).transpose(1, 2)


class _Replayed:
    """Attention that answers as transformers' did of the tokens from ``start`` on, and compares what it is asked."""

    needs_projections = False

    def __init__(self, compared: Compared, start: int) -> None:
        self.seen: list[int] = []
        self.differing: list[int] = []
        self._compared, self._start = compared, start

    def __call__(self, call: Call) -> Tensor:
        at = min(len(self.seen), len(self._compared.outs) - 1)
        self.seen.append(call.layer)
        stop = self._start + call.tokens
        wanted = self._compared.calls[at].rows(self._start, stop)
        for mine, theirs in zip(call.given(), wanted.given(), strict=True):
            if mine.shape != theirs.shape or not _alike(mine, theirs):
                self.differing.append(call.layer)
        return call.share(self._compared.outs[at], self._start, stop)


def probe(adapter: Probed, model: Any, rotation: Rotation) -> Ends:
    """Reject a model that does not do with its mixers what distributed prefill does; raises UserError.

    All mixers must ask once and in order, with heads as their kinds say; transformers' own attention must be that of
    the kind; and a piece of a sequence, a single token even, must not depend on where a call begins. ``rotation`` is
    told which mixers RoPE turns, alone or not at all. Returns what stands round the decoder.
    """
    ids_S = _probe_ids(adapter)
    at_S = torch.arange(len(ids_S), device=adapter.device)
    compared = Compared(narrow=True)
    with torch.inference_mode():
        with reference_attention(model), _running(adapter), narrowed(model) as windows, capturing(()) as theirs:
            adapter.run(ids_S, at_S, compared)
        _check_calls(adapter, [call.layer for call in compared.calls])
        for call, out in zip(compared.calls, compared.outs, strict=True):
            _check_sizes(adapter, call, out)
        if compared.differing:
            maybe = f" (config.json says {', '.join(windows)})" if windows else ""
            kind = adapter.shape.mixers[compared.differing[0]].name
            raise _unfit(adapter, f"attention of mixer {compared.differing[0]} is not of the kind '{kind}'{maybe}")
        first_SE = _check_pieces(adapter, ids_S, at_S, compared, theirs.parts[FINAL])
        for length in {adapter.shape.max_positions, adapter.shape.rope_border or adapter.shape.max_positions}:
            with agreed(length):
                _learn_rotation(adapter, rotation, length - 1)
        with _running(adapter):
            return learn_ends(model, ids_S, first_SE, {KEYWORD: _Replayed(compared, 0)})


def _check_pieces(adapter: Probed, ids_S: Tensor, at_S: Tensor, compared: Compared, theirs_SE: Tensor) -> Tensor:
    """Run the sequence in two pieces; return what the first layer gets (S, E)."""
    if not bool(theirs_SE.isfinite().all()):
        dtype = str(theirs_SE.dtype).removeprefix("torch.")
        raise _unfit(adapter, f"a few tokens give numbers that are not finite in {dtype} (or its weights have some)")
    first = []
    for start, stop in ((0, _CUT), (_CUT, len(ids_S))):
        replayed = _Replayed(compared, start)
        with _running(adapter), capturing((0, FINAL)) as ours:
            adapter.run(ids_S[start:stop], at_S[start:stop], replayed)
        _check_calls(adapter, replayed.seen)
        if replayed.differing:
            raise _unfit(adapter, f"what mixer {replayed.differing[0]} is asked for depends on where a call begins")
        if not _alike(ours.parts[FINAL], theirs_SE[start:stop]):
            raise _unfit(adapter, "what it computes depends on more than its mixers' output")
        if ours.parts[0].shape != ours.parts[FINAL].shape:
            raise _unfit(adapter, f"its layers pass on {tuple(ours.parts[0].shape)} for {stop - start} tokens")
        first.append(ours.parts[0])
    _check_alone(adapter, ids_S, at_S, compared, theirs_SE)
    return torch.cat(first)


def _check_alone(adapter: Probed, ids_S: Tensor, at_S: Tensor, compared: Compared, theirs_SE: Tensor) -> None:
    """Run some tokens each alone; most must ask for, and be, what they are in the sequence."""
    asked, finals = Counter[int](), []
    for token in _ALONE:
        replayed = _Replayed(compared, token)
        with _running(adapter), capturing((FINAL,)) as ours:
            adapter.run(ids_S[token : token + 1], at_S[token : token + 1], replayed)
        asked.update(set(replayed.differing))
        finals.append(ours.parts[FINAL])
    for layer, count in asked.items():
        if count > _MOST * len(_ALONE):
            raise _unfit(adapter, f"what mixer {layer} is asked for depends on other tokens of a call")
    if not _alike(torch.cat(finals), theirs_SE[list(_ALONE)]):
        raise _unfit(adapter, "its tokens see others outside its mixers")


def _probe_ids(adapter: Probed) -> Tensor:
    """Return token ids (S,) from all over the vocabulary, as unlike as it allows."""
    vocab = adapter.shape.vocab
    # Not from 0, which is often padding: a row of zeros, of which nothing can be learnt.
    step = max(1, vocab // _TOKENS)
    ids = [max((i * step + vocab // 2 + 1) % vocab, min(1, vocab - 1)) for i in range(_TOKENS)]
    return torch.tensor(ids, device=adapter.device)


def _learn_rotation(adapter: Probed, rotation: Rotation, far: int) -> None:
    shape, probe = adapter.shape, _Probe()
    distances = sorted({min(_NEAR, far), far})
    ids_S = torch.full((1 + len(distances),), shape.vocab // 2, device=adapter.device)
    with _running(adapter):
        adapter.run(ids_S, torch.tensor([0, *distances], device=adapter.device), probe)
    # Full layers first: draft heads turn as the first that is learnt.
    for call in sorted(probe.seen, key=lambda call: not shape.mixers[call.layer].sharded):
        keys = call.k_BKSD if call.latent is None else call.v_BKSE  # of latents a part of its own is rotated
        both = [x for x in (call.q_BHSD, keys) if x.shape[2] == len(ids_S)]
        # 8 roundings in low precision; in fp32 the angles themselves are known to some 1e-5.
        sizes = [max(1e-3, 8 * torch.finfo(x.dtype).eps) * float(x.abs().max()) for x in both]
        if all(float((x - x[:, :, :1]).abs().max()) <= size for x, size in zip(both, sizes, strict=True)):
            rotation.still.add(call.layer)
            continue
        for x, size in zip(both, sizes, strict=True):
            for row, distance in enumerate(distances, 1):
                rotation.learn(x[:, :, :1], distance, call.layer, x[:, :, row : row + 1], size)


def _check_calls(adapter: Probed, layers: list[int]) -> None:
    """Linear layers ask for their convolution, then for their recurrence."""
    if layers != [i for i, kind in enumerate(adapter.shape.mixers) for _ in range(1 + isinstance(kind, Linear))]:
        raise _unfit(adapter, f"its mixers asked in the order {layers}")


def _check_sizes(adapter: Probed, call: Call, out: Tensor) -> None:
    kind, tokens = adapter.shape.mixers[call.layer], call.tokens
    if isinstance(kind, Linear):
        why = unlike(call, out, kind, _CUT)
        if why is not None:
            raise _unfit(adapter, f"in mixer {call.layer} {why}")
        return
    assert isinstance(call, AttentionCall)
    s = kind.attention_shape(1)
    sizes = ((s.q_heads, s.head_dim), *((s.kv_heads, width) for width in s.row_widths))
    for x, (heads, dim) in zip((call.q_BHSD, call.k_BKSD, call.v_BKSE), sizes, strict=True):
        wanted = (1, heads, tokens, dim)
        if x.shape != wanted:
            raise _unfit(adapter, f"mixer {call.layer} has heads of {tuple(x.shape)}, not {wanted}")


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


def _alike(a_SX: Tensor, b_SX: Tensor) -> bool:
    """Return True where two runs through the same operations differ by roundings alone, at most tokens."""
    a_SX, b_SX = a_SX.flatten(1), b_SX.flatten(1)
    tolerance = max(1e-3, 8 * torch.finfo(a_SX.dtype).eps) * float(b_SX.abs().max())
    near_S = (a_SX - b_SX).abs().amax(-1) <= tolerance
    return float(near_S.float().mean()) >= _MOST


def _unfit(adapter: Probed, why: str) -> UserError:
    return UserError(
        f"the model {adapter.name} cannot be prefilled over hosts: {why}",
        given=adapter.name,
        allowed="causal decoders whose mixers are of a known kind and see positions as they are given",
        remedy="Choose a model of docs/models.md.",
    )
