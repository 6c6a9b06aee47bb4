"""Setup before weights are loaded: model, strategy, compressor and hosts settled; prompts, plans and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb.clusters import Launcher
from apb.compress import Compressor, compressor
from apb.compress.base import check_fits
from apb.draft.spec import DraftSpec
from apb.engine.options import MOST_YARN, EngineOptions
from apb.host.messages import HostSpec
from apb.plan.checks import check_whole
from apb.plan.draft import Handoff
from apb.plan.memory import Generation, host_memory
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import ModelShape
from apb.prompt.prompt import Prompt, Text, make_prompt, with_question_first
from apb.strategies import STRATEGIES, Strategy, strategy
from burst.errors import UserError

DEFAULT_HOSTS = 4
DEFAULT_COMPRESSOR = "query"
PROCESS_BYTES = 400_000_000  # a process with torch and transformers imported: 350 MB resident on Linux, and some room

SMALLEST_CHUNK = 32  # tokens; what is proposed is never less: more chunks would cost time and save next to nothing


@dataclass(frozen=True)
class Setup:
    """A model and a way to prefill it, without weights."""

    spec: HostSpec
    shape: ModelShape
    tokenizer: Any
    strategy: Strategy
    compressor: Compressor | None
    hosts: int
    chunk_tokens: int | None = None  # tokens that a host runs through a layer at once; None: all of its own
    handoff: Handoff | None = None  # what the draft head takes over from a prefill; None without one
    stretches: int | None = None  # positions before YaRN, whose factor is not settled yet; None: nothing is open

    @classmethod
    def make(
        cls,
        model: EngineOptions | str = EngineOptions.model,
        *,
        config: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        **others: Any,
    ) -> Setup:
        """Resolve names; may fetch the model's files (``on_progress(phase, done, total)``).

        ``model``: all options, or the model's name; ``others``: further fields of EngineOptions. ``config``: random
        weights of this configuration, without a tokenizer; the model's name is then only a name.
        Raises UserError for anything unknown or contradictory.
        """
        from apb.models.checks import check_config
        from apb.models.fetch.resolve import resolve
        from apb.models.loading import generation_stop_ids, load_config, load_tokenizer, make_config
        from apb.models.placement import resolve_device, resolve_dtype, torch_dtype
        from apb.models.shape import model_shape
        from apb.models.yarn import with_yarn, yarn_base

        options = EngineOptions(model, **others) if isinstance(model, str) else dataclasses.replace(model, **others)
        chosen = _strategy(options.strategy)
        scorer = _compressor(chosen, options.compress)
        count = options.hosts or chosen.default_hosts or DEFAULT_HOSTS
        path = None if config is not None else resolve(options.model, on_progress=on_progress, cache_dir=cache_dir)
        found = make_config(config or {}) if path is None else load_config(path)
        check_config(found)
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device, found)
        factor = None if options.yarn == "auto" else options.yarn
        shape = model_shape(with_yarn(found, factor), torch_dtype(dtype))
        stops = generation_stop_ids(path) if path is not None else ()
        if options.max_positions is not None:
            shape = dataclasses.replace(shape, max_positions=options.max_positions)
        if scorer is not None:
            check_fits(scorer, shape)
        spec = DraftSpec(options.draft) if isinstance(options.draft, str) else options.draft
        if spec is not None and path is None:
            raise UserError(
                "random weights have no draft head",
                given=f"draft={spec.head} with a configuration",
                allowed="a draft head with a model's own weights",
                remedy="Leave draft out, or name a model.",
            )
        return cls(
            spec=HostSpec(
                str(path or options.model),
                dtype,
                device,
                threads=options.threads,
                timeout_s=options.timeout_s,
                draft=spec,
                config=config,
                graphs=options.graphs,
                yarn=factor,
            ),
            stretches=yarn_base(found) if options.yarn == "auto" else None,
            handoff=None if spec is None or path is None else spec.handoff(shape, stops),
            shape=shape,
            tokenizer=None if path is None else load_tokenizer(path),
            strategy=chosen,
            compressor=scorer,
            hosts=count,
            chunk_tokens=options.chunk_tokens,
        )

    def covering(self, tokens: int) -> Setup:
        """Return the same model with room for a sequence of so many tokens, where ``yarn=auto`` left that open."""
        if self.stretches is None:
            return self
        factor = min(max(1, -(-tokens // self.stretches)), MOST_YARN)
        shape = dataclasses.replace(self.shape, max_positions=factor * self.stretches)
        return dataclasses.replace(self, shape=shape, spec=dataclasses.replace(self.spec, yarn=factor), stretches=None)

    def using(self, strategy: str | Strategy, hosts: int | None = None) -> Setup:
        """Return the same model with another strategy, its own default compressor and host count."""
        chosen = _strategy(strategy)
        count = hosts if hosts is not None else chosen.default_hosts or self.hosts
        return dataclasses.replace(self, strategy=chosen, compressor=_compressor(chosen, None), hosts=count)

    def prompt(self, context: Text, query: Text | None, *, chat: bool = True, question_first: bool = False) -> Prompt:
        """Tokenise a prompt, with ``question_first`` the question before the document as well; raises UserError when a
        part is empty or the template cannot be split."""
        if self.tokenizer is None:
            raise UserError(
                "random weights read no text",
                given=self.spec.model_path,
                allowed="a Prompt of token ids, or a model with a tokenizer",
                remedy="Choose another model, or 'apb bench emulate' and its like for times and bytes.",
            )
        made = make_prompt(self.tokenizer, context, query, chat=chat)
        return with_question_first(self.tokenizer, made) if question_first else made

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse token ids that the model does not have; raises UserError."""
        wrong = [i for i in ids if not 0 <= i < self.shape.vocab]
        if wrong:
            raise UserError(
                "token ids outside the model's vocabulary",
                given=wrong[:5],
                allowed=f"0 to {self.shape.vocab - 1}",
                remedy="Tokenise the text with this model's own tokenizer.",
            )

    def plan(self, prompt: Prompt, new_tokens: int = 0) -> PrefillPlan:
        """Return the plan for a prompt; raises UserError when it cannot be done as asked, before anything is loaded."""
        self.check_ids(prompt.token_ids)
        first = prompt.context_ids[prompt.head : prompt.head + prompt.copied]
        if prompt.copied and (prompt.question is None or first[: len(prompt.question.ids)] != prompt.question.ids):
            raise UserError(
                "another question stands before this document",
                given="no question" if prompt.question is None else f"{len(prompt.question.ids)} other tokens",
                allowed="the question whose copy is in the context",
                remedy="Prefill with that one and fork the cache, or make a Prompt for the new one.",
            )
        plan = self.strategy.plan(prompt.lengths, self.hosts, self.shape, self.compressor)
        check_whole(plan, self.hosts)
        length = None if self.shape.rope_border is None else len(prompt.token_ids) + new_tokens
        plan = dataclasses.replace(plan, chunk_tokens=self.chunk_tokens, draft=self.handoff, rope_length=length)
        scorer = self.compressor
        if scorer is not None and scorer.needs_question and any(plan.kept_rows) and prompt.question is None:
            raise UserError(
                f"compressor '{scorer.name}' needs a question",
                given="a prefill without a question",
                allowed="compressors that need none, such as expected, norm, recent and random",
                remedy="Set compress=expected, give the question, or pass nothing on (strategy.passing_len=0).",
            )
        self.check_room(len(prompt.token_ids), new_tokens)
        return plan

    def check_room(self, tokens: int, new_tokens: int, rope_length: int | None = None) -> None:
        """Refuse what goes beyond the model's positions; nothing is ever truncated. Raises UserError.

        ``rope_length``: what the cache was made for; over the border that RoPE has there, other keys would be needed.
        """
        limit = self.shape.max_positions
        if tokens + new_tokens > limit:
            over = tokens + new_tokens - limit
            raise UserError(
                "prompt and answer are longer than the model's context",
                given=f"{tokens} prompt tokens + {new_tokens} new tokens = {tokens + new_tokens}",
                allowed=f"{limit} positions",
                remedy=f"Shorten the document by {over} tokens, lower decode.max_new_tokens, choose a model with a "
                "longer context, or set max_positions where the model takes more than its config.json says."
                + ("" if self.spec.yarn is None else " A larger yarn is another model: start another engine."),
            )
        border = self.shape.rope_border
        if border is not None and rope_length is not None and rope_length <= border < tokens + new_tokens:
            raise UserError(
                "this cache cannot grow so long: beyond a length the model rotates all keys otherwise (LongRoPE)",
                given=f"{tokens} tokens + {new_tokens} new tokens = {tokens + new_tokens}",
                allowed=f"{border} tokens on a cache that was prefilled for {rope_length}",
                remedy=f"Prefill again for {tokens + new_tokens} tokens: max_new_tokens of Engine.prefill says how "
                "long the answer may be. Or ask for fewer tokens.",
            )

    def check_memory(self, plan: PrefillPlan, answer: Generation, available: int, *, sharing: int, copies: int) -> None:
        """Refuse a plan that needs more than ``available`` bytes on a machine that ``sharing`` hosts share.

        ``copies`` processes, each with the weights, stand on that machine. The heaviest ``sharing`` hosts are
        charged. Raises UserError with the setting to change.
        """
        need = needed_bytes(plan, answer, sharing=sharing, copies=copies)
        if need <= available:
            return
        memories = _heaviest(plan, answer, sharing)
        weights = memories[0]["weights"]
        chunk = fitting_chunk(plan, answer, available, sharing=sharing, copies=copies)
        chunked = f" chunk_tokens={chunk} makes it fit;" if chunk is not None else ""
        halved = " dtype=bfloat16 halves it;" if self.spec.dtype == "float32" else ""
        virtual = " cluster=virtual holds the weights once;" if copies > 1 else ""
        raise UserError(
            f"this prefill does not fit: weights {weights * copies / 1e9:.1f} GB, "
            f"KV {sum(m['kv'] for m in memories) / 1e9:.1f} GB, "
            f"activations {sum(m['activations'] for m in memories) / 1e9:.1f} GB, "
            f"processes {PROCESS_BYTES * copies / 1e9:.1f} GB",
            given=f"{need / 1e9:.1f} GB for {sharing} host(s) on one machine",
            allowed=f"{available / 1e9:.1f} GB free there",
            remedy=f"Change one of these:{chunked}{halved}{virtual} more machines (cluster.address) with more "
            "cluster.hosts make each block smaller; or shorten the document.",
        )


def on_cluster(options: EngineOptions, launcher: Launcher) -> EngineOptions:
    """Return the options with the launcher's hosts and threads where they leave these open."""
    chosen = options.strategy
    own = (STRATEGIES.get(chosen) if isinstance(chosen, str) else chosen).default_hosts
    hosts = options.hosts or launcher.hosts or (launcher.started if own is None else None)
    open_threads = options.threads == EngineOptions.threads
    threads = launcher.threads if open_threads and launcher.threads is not None else options.threads
    return dataclasses.replace(options, hosts=hosts, threads=threads)


def needed_bytes(plan: PrefillPlan, answer: Generation, *, sharing: int, copies: int) -> int:
    """Bytes that a plan needs on a machine; see ``Setup.check_memory``."""
    memories = _heaviest(plan, answer, sharing)
    weights = memories[0]["weights"]
    return copies * (weights + PROCESS_BYTES) + sum(m["kv"] + m["activations"] for m in memories)


def _heaviest(plan: PrefillPlan, answer: Generation, sharing: int) -> list[dict[str, int]]:
    """Return the memory of the ``sharing`` hosts that need most."""
    return sorted((host_memory(plan, r, answer) for r in range(plan.hosts)), key=lambda m: sum(m.values()))[-sharing:]


def fitting_chunk(plan: PrefillPlan, answer: Generation, available: int, *, sharing: int, copies: int) -> int | None:
    """Return the largest power of two of tokens a chunk that fits into ``available`` bytes; None where none does."""
    longest = max(host.tokens_run for host in plan.host_plans)
    chunk = 1 << (longest - 1).bit_length()
    while chunk > SMALLEST_CHUNK:
        chunk //= 2
        smaller = dataclasses.replace(plan, chunk_tokens=chunk)
        if needed_bytes(smaller, answer, sharing=sharing, copies=copies) <= available:
            return chunk
    return None


def _strategy(given: str | Strategy) -> Strategy:
    return strategy(given) if isinstance(given, str) else given


def _compressor(chosen: Strategy, given: str | Compressor | None) -> Compressor | None:
    if not chosen.takes_compressor:
        if given is not None:
            raise UserError(
                f"strategy '{chosen.name}' takes no compressor",
                given=given if isinstance(given, str) else given.name,
                allowed="no compress setting",
                remedy="Leave compress out, or choose strategy=apb or spava.",
            )
        return None
    if isinstance(given, Compressor):
        return given
    return compressor(DEFAULT_COMPRESSOR if given is None else given)
