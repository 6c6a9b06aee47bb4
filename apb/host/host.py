"""One host: a model, a transport, and the caches it holds. The same code runs on every kind of cluster."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.attention.anchored import PrefillAttention
from apb.attention.base import Prefill
from apb.attention.cached import CacheAttention
from apb.attention.chunked import LocalAttention
from apb.attention.exact import ExactAttention
from apb.decode.base import Decoded, DecodeRequest, Decoding, forward
from apb.decode.placement import Links, measure
from apb.decode.score import Score, score
from apb.decode.text import TextStream
from apb.draft.cache import DraftCache
from apb.draft.handoff import hand_over, move
from apb.graphs.capture import Capture, CudaCapture
from apb.host.forward import Passes
from apb.host.load import load_adapter
from apb.host.messages import HostReport, HostSpec, OnEvent, PrefillRequest
from apb.host.process import available_bytes, peak_rss_bytes, reset_peak_rss, rss_bytes
from apb.kv.cache import HostCache
from apb.kv.gather import gather
from apb.layers.base import Place
from apb.models.adapter import Adapter
from apb.models.graphed import GraphedAdapter
from apb.models.lengths import agreed
from burst.kernels import kernel
from burst.transport import Transport


class Host:
    """Executes requests on one host; every host of a cluster gets the same calls in the same order."""

    def __init__(self, spec: HostSpec, transport: Transport, adapter: Adapter | None = None) -> None:
        if transport.device.type == "cpu":
            torch.set_num_threads(spec.threads)
            if spec.threads == 1:
                transport.clock = time.thread_time  # own work, even where hosts share cores
        self.spec, self.transport = spec, transport
        self.adapter = adapter if adapter is not None else load_adapter(spec)
        self.kernel = kernel(spec.kernel, device=self.adapter.device, dtype=self.adapter.dtype)
        graphs = spec.graphs and self.adapter.device.type == "cuda" and self.adapter.fixed
        self.capture: Capture | None = CudaCapture(self.adapter.device) if graphs else None
        self._graphed: GraphedAdapter | None = None
        self.on_event: OnEvent = lambda event: None
        self._caches: dict[str, HostCache] = {}
        self._tokenizer: Any = None
        self._query_s = 0.0

    # -- calls ----------------------------------------------------------------------------------------------------

    def prefill(self, request: PrefillRequest) -> HostReport:
        """Run this host's block (and anchor) through the model, keep its KV, then run the query phase."""
        with agreed(request.plan.rope_length):
            measured = self._measured(lambda: self._prefill(request))
        measured.query_s = self._query_s
        return measured

    def fork(self, source: str, handle: str, query_ids: tuple[int, ...] | None) -> HostReport:
        """Copy a cache: as it is, or cut to its context and asked another question."""
        with agreed(self._caches[source].rope_length):
            return self._measured(lambda: self._fork(source, handle, query_ids))

    def gather(self, source: str, handle: str, rank: int) -> HostReport:
        """Merge a cache on host ``rank`` as a new one; the old one stays."""

        def run() -> None:
            like = torch.empty(0, dtype=self.adapter.dtype, device=self.adapter.device)
            old = self._caches[source]
            new = self._caches[handle] = gather(old, rank, self.transport, self.adapter.shape, like)
            if self.adapter.draft is not None:
                assert old.draft is None or isinstance(old.draft, DraftCache)
                new.draft = move(self.adapter.draft, old.draft, old.owner, rank, self.transport)

        return self._measured(run)

    def generate(self, handle: str, request: DecodeRequest) -> HostReport:
        """Decode over a cache."""
        report: list[Decoded] = []

        def run() -> None:
            cache = self._caches[handle]
            looks = request.stop and self.transport.rank == cache.owner
            stream = TextStream(self.tokenizer, request.stop) if looks else None
            decoding = Decoding(
                self._stepping(request.decoder.step_sizes),
                self.kernel,
                self.transport,
                cache,
                request,
                stream,
                on_token=lambda token: self._say(kind="token", id=token),
                clock=time.perf_counter,
                capture=self.capture,
            )
            report.append(request.decoder.generate(decoding))

        with agreed(self._caches[handle].rope_length):
            measured = self._measured(run)
        measured.decoded = report[0]
        return measured

    def links(self) -> Links:
        """Measure what exchanges between the hosts cost, and reading memory."""
        with torch.inference_mode():
            return measure(self.transport)

    def available(self) -> int:
        """Return the bytes that are free for tensors here."""
        return available_bytes(self.adapter.device)

    def logits(self, handle: str) -> Tensor | None:
        """Return the next token's logits (V,) on the host that decides, else None."""
        logits = self._caches[handle].logits
        return None if logits is None else logits.cpu()

    def score(self, handle: str, token_ids: tuple[int, ...], first: int) -> Score | None:
        """Score given tokens on a copy of a cache; the host that decides returns the score, others None."""
        with torch.inference_mode():
            cache = self._caches[handle].fork()
            with agreed(cache.rope_length):
                return score(self.adapter, self.kernel, self.transport, cache, token_ids, first)

    def release(self, *handles: str) -> None:
        """Forget caches."""
        for handle in handles:
            self._caches.pop(handle, None)

    # -- how ------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, for stop strings; loaded when first needed."""
        if self._tokenizer is None:
            from apb.models.loading import load_tokenizer

            self._tokenizer = load_tokenizer(Path(self.spec.model_path))
        return self._tokenizer

    def _stepping(self, sizes: Set[int]) -> Adapter:
        """Return the model for steps, most of which have one of these numbers of tokens."""
        if self.capture is None:
            return self.adapter
        if self._graphed is None:
            self._graphed = GraphedAdapter(self.adapter, self.capture)
        self._graphed.only(sizes)
        return self._graphed

    def _prefill(self, request: PrefillRequest) -> None:
        plan = request.plan
        # The shape is that of the model loaded here, which knows nothing of the plan's.
        self.transport.agree(f"{request.agreement} {self.adapter.shape}", step="agree on the plan")
        attention = self._prefill_attention(request)
        cache = HostCache(
            mixers=plan.shape.mixers,
            layers=attention.kept,
            members=tuple(range(plan.hosts)),
            spans=tuple(h.spans for h in plan.host_plans),
            length=plan.lengths.context,
            rope_length=plan.rope_length,
        )
        passes = Passes(self.adapter, plan, self.transport.rank, request.anchor_ids, request.block_ids)
        fused = plan.fused and plan.chunk_tokens is None and bool(request.query_ids)
        asked_QF = None
        if fused:
            assert isinstance(attention, PrefillAttention)
            question = CacheAttention(cache, self.transport, self.kernel, cache.length, len(request.query_ids))
            features_SF, asked_QF = passes.with_question(attention, question, cache, request.query_ids)
        else:
            features_SF = passes.blocks(attention)
        if plan.draft is not None:
            draft = self.adapter.draft
            assert draft is not None and features_SF is not None
            wanted = [plan.draft.spans(h.spans, plan.lengths.context) for h in plan.host_plans]
            ids = request.next_ids, request.block_ids
            cache.draft = hand_over(draft, wanted, features_SF, *ids, cache.owner, self.transport)
        if cache.draft is not None and asked_QF is not None:
            cache.draft.observe(asked_QF, request.query_ids, cache.context_len)
        self._query_s = 0.0  # a fused question is part of the blocks' pass
        if request.query_ids and not fused:
            self._finished()
            began = time.perf_counter()
            self._forward(cache, request.query_ids)
            self._finished()
            self._query_s = time.perf_counter() - began
        self._caches[request.handle] = cache

    def _prefill_attention(self, request: PrefillRequest) -> Prefill:
        """Return what executes the plan's steps on this host."""
        plan = request.plan

        def on_layer(layer: int) -> None:
            self._say(kind="layer", done=layer + 1, total=len(plan.shape.mixers))

        if plan.chunk_tokens is not None and plan.alone(self.transport.rank):
            return LocalAttention(plan, Place(self.transport, self.kernel), on_layer)
        if plan.spread is not None:
            return ExactAttention(plan, self.transport, self.kernel, on_layer)
        scorer = request.compressor
        if scorer is not None and scorer.needs_question and any(plan.kept_rows):
            self.adapter.check_rotation()  # before anything is sent
        delta = request.question_delta if plan.question_len else None
        rotate = self.adapter.rotate
        return PrefillAttention(plan, self.transport, self.kernel, request.compressor, delta, rotate, on_layer)

    def _fork(self, source: str, handle: str, query_ids: tuple[int, ...] | None) -> None:
        cache = self._caches[source].fork()
        if query_ids is not None:
            cache.restart()
            self._forward(cache, query_ids)
        self._caches[handle] = cache

    def _forward(self, cache: HostCache, token_ids: tuple[int, ...]) -> None:
        forward(self.adapter, self.kernel, self.transport, cache, token_ids)

    def _measured(self, call: Callable[[], None]) -> HostReport:
        """Run a call without autograd and report its own work, its wall time, and what it sent."""
        t = self.transport
        kinds, links = t.ledger.by_kind(), t.ledger.by_link()
        reset_peak_rss()
        if t.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(t.device)
        rss = rss_bytes()
        self._finished()
        t.settle()  # waits of calls that are not measured
        work, waited, wall = t.clock(), t.waited_s, time.perf_counter()
        with torch.inference_mode():
            call()
        self._finished()  # what is still queued belongs to this call's time
        t.settle()
        return HostReport(
            work_s=t.clock() - work - (t.waited_s - waited),
            wall_s=time.perf_counter() - wall,
            bytes_by_kind=dict(Counter(t.ledger.by_kind()) - Counter(kinds)),
            bytes_by_link=dict(Counter(t.ledger.by_link()) - Counter(links)),
            rss_bytes=rss,
            peak_rss_bytes=peak_rss_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated(t.device) if t.device.type == "cuda" else 0,
        )

    def _finished(self) -> None:
        """Wait until the device has done what it was given."""
        if self.transport.device.type == "cuda":
            torch.cuda.synchronize(self.transport.device)

    def _say(self, **event: Any) -> None:
        if self.transport.rank == 0:
            self.on_event(event)
