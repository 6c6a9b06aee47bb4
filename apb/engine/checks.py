"""Checks that an engine makes before it asks its hosts for anything."""

from __future__ import annotations

from collections.abc import Sequence

from apb.decode.base import Decoder
from apb.draft.spec import DraftSpec
from apb.engine.handle import Caches, KVHandle
from apb.engine.setup import Setup
from apb.plan.shapes import ModelShape
from apb.prompt.prompt import Prompt, Text
from burst.errors import UserError


def check_open(closed: bool, method: str) -> None:
    """Refuse calls on an engine that has ended its hosts; raises UserError."""
    if closed:
        raise UserError(
            "this engine is closed",
            given=f"a call of {method}",
            allowed="calls before Engine.close, or inside the with block",
            remedy="Start another engine with Engine.launch.",
        )


def check_alive(handle: KVHandle, engine: Caches, epoch: int) -> None:
    """Refuse a cache that is not, or no longer, on the engine's hosts; raises UserError."""
    if handle.released:
        raise _elsewhere(handle, "released")
    check_own(handle, engine)
    if handle.interrupted:
        raise UserError(
            "this cache is in an unknown state: an answer from it was interrupted",
            given=handle.id,
            allowed="caches whose answers came to their end",
            remedy="Prefill again; to be able to go back, generate from handle.fork().",
        )
    if handle.epoch != epoch:
        raise UserError(
            "this cache is gone: a host that held part of it died",
            given=handle.id,
            allowed="caches prefilled since the hosts were restarted",
            remedy="Call engine.prefill again.",
        )


def check_own(handle: KVHandle, engine: Caches) -> None:
    """Refuse a cache of another engine; raises UserError."""
    if handle.engine is not engine:
        raise _elsewhere(handle, "prefilled by another engine")


def _elsewhere(handle: KVHandle, given: str) -> UserError:
    return UserError(
        "this cache is not on the engine's hosts",
        given=f"{handle.id}, {given}",
        allowed="caches prefilled by this engine and not released",
        remedy="Call engine.prefill again.",
    )


def check_model(model: object) -> None:
    """Reject what names no model, a Path too: it must not become the default one; raises UserError."""
    if not isinstance(model, str | Setup):
        raise UserError(
            "the model is neither a name nor a Setup",
            given=f"{model!r}",
            allowed="a name, a folder or a hub id as a string, or a Setup",
            remedy="Give str(path) for a Path, or leave model out for the default one.",
        )


def check_stretched(setup: Setup) -> None:
    """Reject a model whose YaRN factor is still open when it is to be loaded; raises UserError."""
    if setup.stretches is not None:
        raise UserError(
            "yarn=auto needs the prompt before the model is loaded",
            given="yarn=auto",
            allowed="'apb ask' and 'apb plan' with yarn=auto, or a whole number",
            remedy="Set yarn=N, or give Engine.launch a Setup that covers the prompt: setup.covering(tokens).",
        )


def check_unsettled(settled: Sequence[str]) -> None:
    """Reject options beside a Setup, which has settled them; raises UserError."""
    if settled:
        raise UserError(
            "a Setup has settled these options already",
            given=", ".join(settled),
            allowed="a Setup and a cluster",
            remedy="Give them to Setup.make, or give the model's name instead of a Setup.",
        )


def check_one_question(context: Text | Prompt, query: Text | None) -> None:
    """Reject a question beside a Prompt, which has its own; raises UserError."""
    if isinstance(context, Prompt) and query is not None:
        raise UserError(
            "a Prompt has its own question",
            given="a Prompt and a query",
            allowed="a Prompt alone, or context and query",
            remedy="Make the Prompt with the question, or fork the cache and ask there.",
        )


def check_tokens(token_ids: Sequence[int]) -> None:
    """Reject an empty answer to score; raises UserError."""
    if not token_ids:
        raise UserError(
            "there are no tokens to score",
            given="none",
            allowed="one or more",
            remedy="Give the answer's token ids.",
        )


def check_rank(rank: int, hosts: int) -> None:
    """Refuse a host that there is not; raises UserError."""
    if not 0 <= rank < hosts:
        raise UserError(
            "no such host to gather on",
            given=rank,
            allowed=f"0 to {hosts - 1}",
            remedy="Choose one of the engine's hosts.",
        )


def check_replicas(handle: KVHandle, rank: int, shape: ModelShape) -> None:
    """Refuse to gather where windows and states of a cache are not kept any more; raises UserError."""
    members = sorted({host for host, _ in handle.blocks})
    if shape.replicated and rank not in members:
        kinds = sorted({kind.name for kind in shape.replicated})
        raise UserError(
            f"only the hosts of this cache keep its layers of the kind {', '.join(kinds)}",
            given=f"rank={rank}",
            allowed=f"rank={members[0]}: it has been gathered there",
            remedy="Gather the cache that came from prefill, or its fork, on that host.",
        )


def check_question(handle: KVHandle) -> None:
    """Refuse to answer where nothing is asked; raises UserError."""
    if handle.prompt.question is None:
        raise UserError(
            "this cache has no question yet",
            given="a cache from prefill(query=None)",
            allowed="a cache with a question",
            remedy="Ask one: handle.fork(query=...).",
        )


def check_head(decoder: Decoder, draft: DraftSpec | None) -> None:
    """Refuse a decoder that drafts with a head where there is none; raises UserError."""
    if decoder.needs_head and draft is None:
        raise UserError(
            f"decoder '{decoder.name}' needs a draft head",
            given="an engine without one",
            allowed="an engine launched with one",
            remedy="Launch it with Engine.launch(..., draft='smollm2-135m'), or with the head of your model.",
        )


def check_gather(rank: int, need: int, available: int) -> None:
    """Refuse to gather a cache where it does not fit; raises UserError. Sizes in bytes."""
    if need > available:
        raise UserError(
            f"the gathered cache does not fit on host {rank}",
            given=f"{need / 1e9:.3f} GB beside what that host holds",
            allowed=f"{available / 1e9:.3f} GB free there",
            remedy="Decode where the cache is (decode.placement=sharded, or auto), or release other caches.",
        )


def nothing_pending() -> UserError:
    """Return the error of asking for logits that have been used, or that no question has made yet."""
    return UserError(
        "no logits are pending on this cache",
        given="a cache without a question, or one that has generated already",
        allowed="a cache straight after prefill or fork with a question",
        remedy="Call handle.fork(query=...) first.",
    )
