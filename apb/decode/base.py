"""Decoders: requests and answers, the state while decoding, and the forward pass of new tokens over a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from apb.attention.cached import CacheAttention
from apb.decode.rules import Past, Rules
from apb.decode.sampling import Sampling
from apb.decode.text import TextStream
from apb.graphs.capture import Capture
from apb.kv.cache import HostCache
from burst.errors import UserError
from burst.kernels import Kernel
from burst.registry import Registry
from burst.transport import Transport

if TYPE_CHECKING:  # transformers takes seconds to import, and names of decoders are asked for by help texts
    from apb.models.adapter import Adapter

GO_ON, STOP, LENGTH = 0, 1, 2  # what the owner tells of the end, with every decision
_TOKEN_BITS = 32  # where a token is told alone, how it ends the answer stands above its own bits


@dataclass(frozen=True)
class DecodeRequest:
    """Request for an answer of at most ``max_new_tokens`` tokens, ended earlier by a stop token or a stop string.

    ``rules``: what the model's generation configuration asks for beside. ``history``: all tokens so far, int64 (N,),
    for decoders and rules that read them; on the owner only.
    Raises UserError when there is nothing to generate, or for an empty stop string.
    """

    decoder: Decoder
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    rules: Rules = field(default_factory=Rules)
    history: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise UserError(
                "nothing to generate",
                given=self.max_new_tokens,
                allowed="a whole number, 1 or more",
                remedy="Change decode.max_new_tokens.",
            )
        wrong = [s for s in self.stop if not s or not isinstance(s, str)]  # an empty one stands before every text
        if wrong:
            raise UserError(
                "a stop string is empty, or no string",
                given=f"decode.stop={wrong[0]!r}",
                allowed="strings of one character or more",
                remedy="Leave decode.stop out to stop at the model's own stop tokens only.",
            )


@dataclass
class Drafting:
    """Counts of speculation, taken on the host that drafts."""

    steps: int = 0  # verifications
    decided: int = 0  # tokens they decided, the bonus token of each included
    rows: int = 0  # tree rows verified, roots included
    head_rows: int = 0  # rows of the draft's LM head computed: nodes expanded times draft vocabulary
    draft_s: float = 0.0
    verify_s: float = 0.0  # the forward pass over all shards, waiting included

    @property
    def accepted_length(self) -> float | None:
        """Tokens decided per verification, the bonus token counted (EAGLE's tau)."""
        return self.decided / self.steps if self.steps else None


@dataclass
class Decoded:
    """A decoded answer, the same on every host except the times, which each host reads from its own clock."""

    token_ids: list[int]
    finish_reason: str  # "stop" (stop token or string) or "length"
    times_s: list[float]  # monotonic clock at each token
    drafting: Drafting | None = None  # on the owner, where there was any


@dataclass
class Decoding:
    """State of one host while it decodes.

    The owner has a ``stream`` when there are stop strings to look for.
    """

    adapter: Adapter
    kernel: Kernel
    transport: Transport
    cache: HostCache
    request: DecodeRequest
    stream: TextStream | None
    on_token: Callable[[int], None]
    clock: Callable[[], float]
    capture: Capture | None = None  # where steps run as graphs
    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    past: Past | None = None  # on the owner, where there are rules

    def __post_init__(self) -> None:
        if self.request.rules and self.decides:
            assert self.request.history is not None
            self.past = Past(self.request.rules, self.request.history, self.request.stop_ids)

    @property
    def decides(self) -> bool:
        """True on the owner, the host that decides tokens."""
        return self.transport.rank == self.cache.owner

    def choose(self, logits_V: Tensor, position: int, path: Sequence[int] = ()) -> int:
        """Return the token at ``position``: a function of logits, seed, position and the tokens before it, however it
        is decoded. ``path``: those of them that are not decided yet."""
        if self.past is not None:
            logits_V = self.past.ruled(logits_V, path)
        return self.request.sampling.choose(logits_V, position)

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Return the tokens up to the first that ends the answer, that one included, and how they end it."""
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            stopped = token in self.request.stop_ids
            if self.stream is not None:
                self.stream.push(token)
                stopped = stopped or self.stream.stopped
            if stopped:
                return taken, STOP
            if len(self.ids) + len(taken) == self.request.max_new_tokens:
                return taken, LENGTH
        return taken, GO_ON

    def take(self, tokens: Sequence[int]) -> None:
        """Note decided tokens; the last one's KV is not in the cache yet."""
        for token in tokens:
            self.ids.append(token)
            self.times_s.append(self.clock())
            self.on_token(token)
        if self.past is not None:
            self.past.extend(tokens)
        if tokens:
            self.cache.undecoded, self.cache.logits = tokens[-1], None

    def decide(self) -> int:
        """Decide the next token from the cache's logits, tell it to all, and return how it ends the answer.

        Every host calls this.
        """
        word = torch.zeros(1, dtype=torch.int64, device=self.transport.device)
        if self.decides:
            assert self.cache.logits is not None
            (token,), ending = self.cut([self.choose(self.cache.logits, position=self.cache.length)])
            word[0] = token | ending << _TOKEN_BITS
        self.transport.broadcast(word, self.cache.owner, kind="token", step=f"token {len(self.ids)}").wait()
        ending, token = divmod(int(word), 1 << _TOKEN_BITS)
        self.take([token])
        return ending

    def finished(self, ending: int, drafting: Drafting | None = None) -> Decoded:
        """Return what came out."""
        return Decoded(self.ids, "stop" if ending == STOP else "length", self.times_s, drafting)


class Decoder(ABC):
    """A way of decoding; its fields are its options. Every host calls ``generate`` with the same request, and gets the
    same tokens; the cache is left ready to go on.

    ``needs_head``: whether the decoder drafts with the engine's draft head.
    """

    name: ClassVar[str]
    needs_head: ClassVar[bool] = False

    @property
    def needs_history(self) -> bool:
        """True for decoders that read all tokens so far."""
        return False

    @property
    def tree_tokens(self) -> int:
        """Most tokens that go through the model at once."""
        return 1

    @property
    def step_sizes(self) -> frozenset[int]:
        """Numbers of tokens of steps that are worth a graph: those that most steps have."""
        return frozenset({1})

    @abstractmethod
    def generate(self, decoding: Decoding) -> Decoded:
        """Decode until the request ends."""


DECODERS: Registry[type[Decoder]] = Registry("decoder", "apb.decode", "decode")


def forward(
    adapter: Adapter,
    kernel: Kernel,
    transport: Transport,
    cache: HostCache,
    token_ids: Sequence[int],
    *,
    all_logits: bool = False,
) -> Tensor | None:
    """Run new tokens over the cache; their KV goes to the owner, which keeps the last token's logits.

    With ``all_logits`` the owner gets those after every token, (S, V), as well.
    """
    start = cache.length
    cache.length += len(token_ids)
    if transport.rank not in cache.members:
        return None
    ids_S = torch.tensor(token_ids, device=adapter.device)
    positions_S = torch.arange(start, cache.length, device=adapter.device)
    attention = CacheAttention(cache, transport, kernel, start, len(token_ids))
    if transport.rank != cache.owner:
        adapter.run(ids_S, positions_S, attention)
        return None
    with adapter.capturing(cache.draft.taps if cache.draft is not None else None) as features:
        if all_logits:
            logits_SV = adapter.all_logits(ids_S, positions_S, attention)
        else:
            logits_SV = adapter.logits(ids_S, positions_S, attention)[None]
    if cache.draft is not None:
        cache.draft.observe(features.value_SF, token_ids, start)
    cache.logits = logits_SV[-1]
    return logits_SV if all_logits else None
