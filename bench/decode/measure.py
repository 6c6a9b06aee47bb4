"""One question answered by every decoder, each from its own copy of the same cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apb.decode import decoder
from apb.decode.base import Decoder
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.engine import Engine, Result
from apb.prompt import Prompt
from launch.settings import DecodeSettings

PLAIN = "autoregressive"
REPEAT = 16  # tokens: an answer that says as many twice has run into a loop, which drafts follow all too well


def decoders(chosen: Decoder, sizes: Sequence[int]) -> dict[str, Decoder]:
    """Return what is compared, by label: plain decoding, prompt lookup, what was chosen, trees and chains of sizes."""
    found: dict[str, Decoder] = {PLAIN: decoder(PLAIN), "lookup": Lookup(), label(chosen): chosen}
    if isinstance(chosen, Eagle2):
        for size in sizes:
            tree = dataclasses.replace(chosen, tokens=size, tree="fixed", lookup=False)
            chain = dataclasses.replace(tree, width=1, depth=size - 1)
            found |= {label(tree): tree, label(chain): chain}
    return found


def label(made: Decoder) -> str:
    """Return what rows call a decoder: what it drafts, and of how many rows."""
    if isinstance(made, Eagle2):
        shape = "chain" if made.width == 1 else f"tree {made.depth}x{made.width}"
        extra = (", auto" if made.tree == "auto" else "") + (", lookup" if made.lookup else "")
        return f"{shape} of {made.tokens}{extra}"
    return made.name


def measure(
    engine: Engine, prompt: Prompt, settings: DecodeSettings, made: Sequence[tuple[str, Decoder]], new_tokens: int
) -> list[dict[str, Any]]:
    """Prefill once and decode with each; returns a row each, in order, with whether the tokens are plain decoding's.

    ``steps`` counts forward passes of the target; ``decided`` the tokens that they decided, bonus tokens included: the
    first token comes from the prefill and counts for none. Bytes are those of all hosts, work that of the drafting one.
    """
    handle = engine.prefill(prompt)
    rows, plain = [], None
    for name, each in made:
        copy = handle.fork()
        result = engine.generate(
            copy,
            new_tokens,
            each,
            placement=settings.placement,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed,
        )
        copy.release()
        plain = result.token_ids if each.name == PLAIN else plain
        rows.append({"decoder": name, **_row(result, handle.owner), "same": plain in (None, result.token_ids)})
    handle.release()
    return rows


def _row(result: Result, owner: int) -> dict[str, Any]:
    m, ids = result.metrics, result.token_ids
    drafting = m["drafting"] or {"steps": len(ids) - 1, "decided": len(ids) - 1, "rows": len(ids) - 1}
    return {
        "tokens": len(ids),
        "repeats": _repeats(ids),
        "steps": drafting["steps"],
        "decided": drafting["decided"],
        "rows": drafting["rows"],
        "head_rows": drafting.get("head_rows", 0),
        "draft_s": drafting.get("draft_s", 0.0),
        "work_s": m["decode_work_s"][owner],
        "tokens_per_s": m["decode_tokens_per_s"],
        "bytes": m["decode_bytes"],
        "hosts_decoding": m["hosts_decoding"],
    }


def _repeats(ids: Sequence[int]) -> bool:
    seen = set()
    for at in range(len(ids) - REPEAT + 1):
        gram = tuple(ids[at : at + REPEAT])
        if gram in seen:
            return True
        seen.add(gram)
    return False
