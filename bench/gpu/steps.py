"""Times of speculation's steps, draft and verification, at a large model's shape: random weights, one host.

With random weights next to nothing is accepted; what a step costs does not depend on it.

Shapes: K kv heads, T tokens, D head dim, E hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from apb.decode.base import DecodeRequest
from apb.decode.eagle2 import Eagle2
from apb.draft.cache import DraftCache
from apb.draft.draft import Draft
from apb.draft.eagle import EagleHead
from apb.host.host import Host
from apb.host.load import load_adapter
from apb.host.messages import HostSpec
from apb.kv.cache import HostCache
from apb.layers.base import LayerKind
from apb.layers.full import Full, FullCache
from apb.layers.rows import LayerKV
from bench.tools.timing import spread
from burst.transport import VirtualWorld

STEPS = 24  # timed in a run
AT_END = 8  # steps at the end of an answer, whose trees are cut
WINDOW, SINKS = 512, 4


class Stand:
    """A loaded random model, and a draft head as large as one of its layers, which drafts from all ids or some."""

    def __init__(self, config: Mapping[str, Any], dtype: str, device: str) -> None:
        self._spec = HostSpec("random weights", dtype, device, config=config)
        self._adapter = load_adapter(self._spec)
        head = EagleHead.fresh(self._adapter.draft_target(), window=WINDOW, sinks=SINKS)
        self._head = head.to(self._adapter.dtype).eval().requires_grad_(False)

    def measure(
        self, context: int, vocab: int | None, graphs: bool, decoder: Eagle2, repeats: int = 3
    ) -> dict[str, Any]:
        """Return the seconds of steps over a cache of ``context`` tokens, drafting from ``vocab`` ids (None: all)."""
        head = self._head if vocab is None else self._head.with_vocab(torch.arange(vocab, device=self._adapter.device))
        request = DecodeRequest(decoder, max_new_tokens=STEPS + AT_END)
        seconds: list[float] = []
        accepted: list[float] = []
        with self._host(graphs) as host:
            host._caches["all"] = self._cache(context, Draft(head))
            for number in range(-1, repeats):
                host.fork("all", "one", None)
                decoded = host.generate("one", request).decoded
                assert decoded is not None and decoded.drafting is not None
                accepted.append(decoded.drafting.accepted_length or 0.0)
                if number >= 0:  # the first run captures; the first step of the others captures the draft's
                    seconds += [b - a for a, b in itertools.pairwise(decoded.times_s[1 : STEPS + 1])]
        return {
            "context": context,
            "vocab": len(head.ids_V),
            "graphs": graphs and host.capture is not None,
            "step_s": spread(seconds),
            "accepted_length": max(accepted),
            "tree": decoder.tokens,
        }

    @contextmanager
    def _host(self, graphs: bool) -> Iterator[Host]:
        (transport,) = VirtualWorld(1, device=self._adapter.device).transports
        yield Host(HostSpec(**{**vars(self._spec), "graphs": graphs}), transport, self._adapter)

    def _cache(self, context: int, draft: Draft) -> HostCache:
        """Return a cache of random keys and values; a draft's features are random, too."""
        s, kept = self._adapter.shape, min(context, WINDOW + SINKS)
        rows = LayerKV(*self._random(draft.head.kv_heads, kept, draft.head.head_dim))
        drafted = DraftCache(draft, rows, range(context - kept, context), kept, None)
        with torch.inference_mode():
            drafted.observe(self._normal(1, s.hidden), [0], context - 1)
        return HostCache(
            mixers=s.mixers,
            layers=[self._layer(kind, context) for kind in s.mixers],
            members=(0,),
            spans=(((0, context),),),
            length=context,
            logits=self._normal(s.vocab).float(),
            draft=drafted,
        )

    def _layer(self, kind: LayerKind, context: int) -> FullCache:
        assert isinstance(kind, Full) and kind.qk_dim == kind.v_dim
        return FullCache(kind, LayerKV(*self._random(kind.kv_heads, context, kind.qk_dim)))

    def _random(self, kv_heads: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._normal(1, kv_heads, tokens, dim), self._normal(1, kv_heads, tokens, dim)

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=self._adapter.device, dtype=self._adapter.dtype)
