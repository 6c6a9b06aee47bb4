"""Gathering: a sharded cache moved to one host, where that is asked for or pays."""

from __future__ import annotations

import dataclasses

from apb.decode.base import DecodeRequest
from apb.decode.placement import Links, gathered_bytes, gathering_pays
from apb.engine.calls import Calls
from apb.engine.checks import check_gather, check_replicas
from apb.engine.handle import KVHandle
from apb.engine.metrics import added
from apb.engine.setup import Setup


class Gathering:
    """Moves caches, and knows the hosts' links and free memory."""

    def __init__(self, setup: Setup, calls: Calls) -> None:
        self._setup, self._calls = setup, calls
        self._links: Links | None = None

    def gather(self, handle: KVHandle, rank: int) -> KVHandle:
        """Return the cache merged on host ``rank``; raises UserError where it does not fit."""
        check_replicas(handle, rank, self._setup.shape)
        need = gathered_bytes(self._setup.shape, handle.next_position, 0, 1)
        check_gather(rank, need, self.available(rank))
        return self._gathered(handle, rank)

    def links(self) -> Links:
        """Return what exchanges between the hosts cost, measured once: the slowest host's."""
        if self._links is None:
            found = self._calls.all("links")
            self._links = Links(
                max(x.latency_s for x in found),
                min(x.bytes_per_s for x in found),
                min(x.read_bytes_per_s for x in found),
            )
        return self._links

    def place(self, handle: KVHandle, wanted: str, request: DecodeRequest) -> None:
        """Move a cache to its deciding host where that is wanted, or (auto) pays."""
        shards = handle.shards
        if len(shards) == 1 or wanted == "sharded":
            return
        new_tokens, tree_tokens = request.max_new_tokens, request.decoder.tree_tokens
        if wanted == "auto" and not gathering_pays(self.links(), self._setup.shape, shards, new_tokens, tree_tokens):
            return
        need = gathered_bytes(self._setup.shape, handle.next_position, new_tokens, tree_tokens)
        available = self.available(handle.owner)
        if wanted == "auto" and need > available:
            return
        check_gather(handle.owner, need, available)
        there = self._gathered(handle, handle.owner)
        self._calls.all("release", handle.id)
        handle.id, handle.blocks, handle.metrics = there.id, there.blocks, there.metrics
        there.released = True  # its cache is the handle's now

    def _gathered(self, handle: KVHandle, rank: int) -> KVHandle:
        new_id = self._calls.names.new()
        reports = self._calls.all("gather", handle.id, new_id, rank)
        blocks = ((rank, len(handle.prompt.context_ids)),)
        metrics = added(handle.metrics, reports) | {"gathered_on": rank}
        generated = list(handle.generated)
        return dataclasses.replace(handle, id=new_id, blocks=blocks, owner=rank, generated=generated, metrics=metrics)

    def available(self, rank: int) -> int:
        """Return the bytes that are free on a host."""
        found: int = self._calls.all("available")[rank]
        return found
