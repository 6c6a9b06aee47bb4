"""The engine: prefill a long context over hosts, ask questions about it, generate answers. Read this file first."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

from torch import Tensor

from apb.clusters import Cluster, Launcher, launcher
from apb.compress.base import Compressor
from apb.decode import decoder as make_decoder
from apb.decode.base import Decoder, DecodeRequest
from apb.decode.placement import PLACEMENTS, Links
from apb.decode.rules import Rules
from apb.decode.sampling import Sampling
from apb.decode.score import Score
from apb.draft.spec import DraftSpec
from apb.engine.calls import Calls
from apb.engine.checks import (
    check_alive,
    check_head,
    check_model,
    check_one_question,
    check_own,
    check_question,
    check_rank,
    check_stretched,
    check_tokens,
    check_unsettled,
    nothing_pending,
)
from apb.engine.gathering import Gathering
from apb.engine.generation import rules_asked, stop_ids
from apb.engine.handle import KVHandle
from apb.engine.metrics import decoded, measured, prefilled, versions
from apb.engine.options import EngineOptions
from apb.engine.requests import decode_requests, prefill_request
from apb.engine.result import Result
from apb.engine.setup import Setup, on_cluster
from apb.engine.telling import Teller, layer_events
from apb.prompt.prompt import Prompt, Question, Text, make_question, with_question_first
from apb.strategies import Strategy
from burst.errors import choose

__all__ = ["Engine", "Result", "versions"]


class Engine:
    """A model on a cluster of hosts, ready to prefill; a context manager that ends its hosts."""

    def __init__(self, setup: Setup, cluster: Cluster) -> None:
        self.setup = setup
        self.cluster = cluster
        self._calls = Calls(cluster)
        self._gathering = Gathering(setup, self._calls)

    @classmethod
    def launch(
        cls,
        model: str | Setup = "smollm2-135m",
        *,
        cluster: str | Launcher = "virtual",
        hosts: int | None = None,
        strategy: str | Strategy = "apb",
        compress: str | Compressor | None = None,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 1,
        timeout_s: float = 600.0,
        chunk_tokens: int | None = None,
        max_positions: int | None = None,
        yarn: int | Literal["auto"] | None = None,
        draft: str | DraftSpec | None = None,
        graphs: bool = True,
        **cluster_options: Any,
    ) -> Engine:
        """Start the hosts and load the model on each.

        ``model`` is a name, a folder, a hub id, or a Setup, which has settled everything but the cluster. ``cluster``
        is the name of one, with ``cluster_options`` of its own (ray: address), or the launcher that
        ``apb.clusters.launcher(name, ...)`` makes, with hosts and threads where these are left open here. The other
        parameters are the fields of EngineOptions, which says what they mean. Raises UserError for anything unknown,
        before any host starts.
        """
        check_model(model)
        started = launcher(cluster, **cluster_options)
        given = EngineOptions(
            model=EngineOptions.model if isinstance(model, Setup) else model,
            hosts=hosts,
            strategy=strategy,
            compress=compress,
            dtype=dtype,
            device=device,
            threads=threads,
            timeout_s=timeout_s,
            chunk_tokens=chunk_tokens,
            max_positions=max_positions,
            yarn=yarn,
            draft=draft,
            graphs=graphs,
        )
        if isinstance(model, Setup):
            settled = [f.name for f in dataclasses.fields(given) if getattr(given, f.name) != f.default]
            check_unsettled(settled)
        setup = model if isinstance(model, Setup) else Setup.make(on_cluster(given, started))
        check_stretched(setup)
        return cls(setup, started.start(setup.spec, setup.hosts))

    @property
    def model_path(self) -> str:
        """The resolved folder of the model."""
        return self.setup.spec.model_path

    def prefill(
        self,
        context: Text | Prompt,
        query: Text | None = None,
        chat: bool = True,
        question_first: bool = False,
        max_new_tokens: int = 0,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> KVHandle:
        """Prefill a context over the hosts and run the question, if there is one, over the sharded cache.

        ``context`` and ``query`` are text or token ids; ``chat`` puts them into the chat template (a Prompt has its
        question and its template already); ``question_first`` puts the question before the document as well. Without a
        question the cache is unconditioned: ask with ``handle.fork(query=...)``. ``max_new_tokens``: of an answer that
        needs room; LongRoPE is told of both. ``on_layer(done, total)`` reports progress.
        """
        start = time.perf_counter()
        check_one_question(context, query)
        prompt = context if isinstance(context, Prompt) else self.setup.prompt(context, query, chat=chat)
        if question_first:
            prompt = with_question_first(self.setup.tokenizer, prompt)
        plan = self.setup.plan(prompt, max_new_tokens)
        handle_id = self._calls.names.new()
        requests = [(prefill_request(handle_id, prompt, plan, self.setup.compressor, r),) for r in range(plan.hosts)]
        reports = self._calls.each("prefill", requests, layer_events(on_layer))
        asked = prompt.question if plan.question_len or prompt.copied else None
        names = {"model": self.model_path, "cluster": self.cluster.name}
        return KVHandle(
            engine=self,
            id=handle_id,
            prompt=prompt,
            exact=plan.exact,
            conditioned_on=(asked.text or asked.ids) if asked else None,
            blocks=plan.blocks,
            owner=plan.hosts - 1,
            epoch=self.cluster.epoch,
            rope_length=plan.rope_length,
            metrics=names | prefilled(prompt, plan, reports, time.perf_counter() - start),
        )

    def generate(
        self,
        handle: KVHandle,
        max_new_tokens: int = 64,
        decode: str | Decoder = "autoregressive",
        placement: str = "sharded",
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        on_token: Callable[[str], None] | None = None,
    ) -> Result:
        """Generate from a handle, which goes on from there when asked again.

        Ends at the model's stop tokens, at a ``stop`` string, or after ``max_new_tokens``. ``decode``: a name, or what
        ``apb.decode.decoder(name, ...)`` makes; with the same seed all give the same tokens. ``placement``: sharded
        decodes over the hosts' parts where they are; gathered moves them, and the handle, to the deciding host first;
        auto takes what measured links and the longest answer make cheaper. ``on_token(piece)`` gets the text as
        it comes. Raises UserError when there is no question yet, no room for that many tokens, or no draft head for a
        decoder that needs one.
        """
        start = time.perf_counter()
        self._alive(handle)
        choose("value of decode.placement:", placement, PLACEMENTS)
        decoder = make_decoder(decode) if isinstance(decode, str) else decode
        check_question(handle)
        check_head(decoder, self.setup.spec.draft)
        request = DecodeRequest(
            decoder,
            max_new_tokens,
            Sampling(temperature, top_p, top_k, seed),
            self._stop_ids(),
            (stop,) if isinstance(stop, str) else tuple(stop or ()),
            self._rules[0],
        )
        self.setup.check_room(handle.next_position, max_new_tokens, handle.rope_length)
        self._gathering.place(handle, placement, request)
        teller = Teller(self.setup.tokenizer, request, on_token)
        handle.interrupted = True  # until the answer is whole, however it ends
        reports = self._calls.each("generate", decode_requests(handle, request, self.cluster.hosts), teller.event)
        text = teller.finish()
        answer = reports[handle.owner].decoded
        assert answer is not None and teller.first_s is not None
        waited_s = 0.0 if handle.generated else handle.metrics["request_s"]  # the first answer waited for the prefill
        metrics = decoded(handle.metrics, reports, answer, decoder.name, waited_s + teller.first_s - start)
        handle.generated += answer.token_ids
        handle.interrupted = False
        metrics |= {"conditioned_on": handle.conditioned_on, "hosts_decoding": len({h for h, _ in handle.blocks})}
        metrics |= {"generation_rules": request.rules.changes, "generation_ignored": list(self._rules[1])}
        return Result(text, tuple(answer.token_ids), answer.finish_reason, metrics)

    def fork(self, handle: KVHandle, query: Text | Question | None = None) -> KVHandle:
        """Ask another question on the same context (only the query phase runs), or copy a cache as it stands.

        Text and ids become a question as in ``prefill``; a Question runs as it is.
        """
        start = time.perf_counter()
        self._alive(handle)
        prompt, generated = handle.prompt, list(handle.generated)
        ids: tuple[int, ...] | None = None
        if query is not None:
            question = query
            if not isinstance(question, Question):
                question = make_question(self.setup.tokenizer, question, chat=prompt.chat, after=prompt)
            prompt, generated, ids = dataclasses.replace(prompt, question=question), [], question.query_ids
            self.setup.check_ids(ids)
            self.setup.check_room(len(prompt.token_ids), 0, handle.rope_length)
        new_id = self._calls.names.new()
        reports = self._calls.all("fork", handle.id, new_id, ids)
        metrics = handle.metrics | {"query_tokens": prompt.lengths.query, "forked": True}
        if query is not None:
            metrics |= measured(reports, time.perf_counter() - start)
        return dataclasses.replace(handle, id=new_id, prompt=prompt, generated=generated, metrics=metrics)

    def gather(self, handle: KVHandle, rank: int = 0) -> KVHandle:
        """Merge a cache on host ``rank``; the given handle stays usable. Raises UserError where it does not fit."""
        self._alive(handle)
        check_rank(rank, self.cluster.hosts)
        return self._gathering.gather(handle, rank)

    def logits(self, handle: KVHandle) -> Tensor:
        """Return the next token's logits (V,); raises UserError before a question or after generating."""
        self._alive(handle)
        logits: Tensor | None = self._calls.all("logits", handle.id)[handle.owner]
        if logits is None:
            raise nothing_pending()
        return logits

    def score(self, handle: KVHandle, token_ids: Sequence[int], first: int = 0) -> Score:
        """Return the log-probabilities of given tokens, teacher-forced after the prompt; the cache stays as it is.

        ``first``: of how many tokens the whole distribution is wanted too. Raises UserError before a question, after
        generating, without tokens, and beyond the model's positions.
        """
        self._alive(handle)
        if handle.prompt.question is None or handle.generated:
            raise nothing_pending()
        ids = tuple(int(i) for i in token_ids)
        check_tokens(ids)
        self.setup.check_ids(ids)
        self.setup.check_room(handle.next_position, len(ids), handle.rope_length)
        found: Score | None = self._calls.all("score", handle.id, ids, first)[handle.owner]
        assert found is not None
        return found

    def release(self, handle: KVHandle) -> None:
        """Free a cache on all hosts; may be called twice. Raises UserError for another engine's cache."""
        check_own(handle, self)
        if not (self._calls.closed or handle.released or handle.epoch != self.cluster.epoch):
            self._calls.all("release", handle.id)
        handle.released = True

    def dropped(self, handle_id: str, epoch: int) -> None:
        """Note a cache that nobody refers to any more; the next call frees it on all hosts."""
        self._calls.names.dropped.append((handle_id, epoch))

    def close(self) -> None:
        """End the hosts; may be called twice."""
        self._calls.closed = True
        self.cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def links(self) -> Links:
        """Return what exchanges between the hosts cost, measured once: the slowest host's."""
        return self._gathering.links()

    def _alive(self, handle: KVHandle) -> None:
        check_alive(handle, self, self.cluster.epoch)

    def _stop_ids(self) -> tuple[int, ...]:
        return stop_ids(self.setup.spec)

    @functools.cached_property
    def _rules(self) -> tuple[Rules, tuple[str, ...]]:
        return rules_asked(self.setup.spec)
