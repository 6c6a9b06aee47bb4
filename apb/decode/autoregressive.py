"""One token at a time over a cache that may lie on many hosts: the owner decides, all follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from apb.decode.sampling import Sampling
from apb.decode.text import TextStream
from apb.kv.cache import CacheAttention, HostCache
from apb.models.adapter import Adapter
from burst.errors import UserError
from burst.kernels import Kernel
from burst.transport import Transport

# What the owner tells with each token, above the token's own bits.
GO_ON, STOP, LENGTH = 0, 1, 2
_TOKEN_BITS = 32


@dataclass(frozen=True)
class DecodeRequest:
    """What to generate: at most ``max_new_tokens``, ended earlier by a stop token or a stop string.

    Raises UserError when there is nothing to generate, or for an empty stop string.
    """

    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

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
class Decoded:
    """What came out; the same on every host except ``times_s``, which each host reads from its own clock."""

    token_ids: list[int]
    finish_reason: str  # "stop" (stop token or string) or "length"
    times_s: list[float]  # monotonic clock at each token


def generate(
    adapter: Adapter,
    kernel: Kernel,
    transport: Transport,
    cache: HostCache,
    request: DecodeRequest,
    stream: TextStream | None,
    on_token: Callable[[int], None],
    clock: Callable[[], float],
) -> Decoded:
    """Decode on ``cache`` and leave it ready to go on; every host calls this.

    The owner has a ``stream`` when there are stop strings to look for. A stop token ends the list of ids.
    """
    decides = transport.rank == cache.owner
    ids: list[int] = []
    times: list[float] = []
    while True:
        if cache.undecoded is not None:
            forward(adapter, kernel, transport, cache, [cache.undecoded])
            cache.undecoded = None
        word = torch.zeros(1, dtype=torch.int64, device=transport.device)
        if decides:
            assert cache.logits is not None
            token = request.sampling.choose(cache.logits, position=cache.length)
            stopped = token in request.stop_ids
            if stream is not None:
                stream.push(token)
                stopped = stopped or stream.stopped
            ending = STOP if stopped else LENGTH if len(ids) + 1 == request.max_new_tokens else GO_ON
            word[0] = token | ending << _TOKEN_BITS
        transport.broadcast(word, cache.owner, kind="token", step=f"token {len(ids)}").wait()
        ending, token = divmod(int(word), 1 << _TOKEN_BITS)
        ids.append(token)
        times.append(clock())
        cache.undecoded, cache.logits = token, None
        on_token(token)
        if ending != GO_ON:
            return Decoded(ids, "stop" if ending == STOP else "length", times)


def forward(adapter: Adapter, kernel: Kernel, transport: Transport, cache: HostCache, token_ids: Sequence[int]) -> None:
    """Run new tokens over the cache; their KV goes to the owner, which keeps the last token's logits."""
    start = cache.length
    cache.length += len(token_ids)
    if transport.rank not in cache.members:
        return
    ids_S = torch.tensor(token_ids, device=adapter.device)
    positions_S = torch.arange(start, cache.length, device=adapter.device)
    attention = CacheAttention(cache, transport, kernel)
    if transport.rank == cache.owner:
        cache.logits = adapter.logits(ids_S, positions_S, attention)
    else:
        adapter.run(ids_S, positions_S, attention)
