"""One question answered by every decoder, each from its own copy of the same cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apb.decode import decoder
from apb.decode.base import Decoder
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.decode.tree import capacity
from apb.engine.engine import Engine, Result
from apb.prompt.prompt import Prompt
from burst.errors import UserError
from launch.config.settings import DecodeSettings

PLAIN = "autoregressive"
REPEAT = 16  # tokens: an answer that says as many twice has run into a loop, which drafts follow all too well


def decoders(chosen: Decoder, sizes: Sequence[int]) -> dict[str, Decoder]:
    """Return what is compared, by label: plain decoding, prompt lookup, what was chosen, trees and chains of sizes."""
    found: dict[str, Decoder] = {PLAIN: decoder(PLAIN), label(Lookup()): Lookup(), label(chosen): chosen}
    if isinstance(chosen, Eagle2):
        shape = Eagle2() if chosen.width == 1 else chosen
        most = 1 + capacity(shape.depth, shape.width)
        for size in sizes:
            if not 2 <= size <= most:
                raise UserError(
                    "no tree has that many rows",
                    given=f"bench.sizes has {size}",
                    allowed=f"2 to {most} for depth {shape.depth} and width {shape.width}",
                    remedy="Change bench.sizes, or decode.depth and decode.width.",
                )
            tree = Eagle2(depth=shape.depth, width=shape.width, tokens=size)
            chain = Eagle2(depth=size - 1, width=1, tokens=size)
            found |= {label(tree): tree, label(chain): chain}
    return found


def shape(made: Decoder) -> str | None:
    """Return ``tree`` or ``chain`` for what is compared as such: of a fixed size, from the head alone."""
    if not isinstance(made, Eagle2) or made.tree == "auto" or made.lookup:
        return None
    return "chain" if made.width == 1 else "tree"


def label(made: Decoder) -> str:
    """Return what rows call a decoder: what it drafts, and of how many rows."""
    if isinstance(made, Lookup):
        return f"lookup of {made.tokens}" + (f", match {made.match}" if made.match != Lookup.match else "")
    if not isinstance(made, Eagle2):
        return made.name
    chain = made.width == 1
    words = [f"{'chain' if chain else f'tree {made.depth}x{made.width}'} of {made.tokens}"]
    words += [f"depth {made.depth}"] if chain and made.depth != made.tokens - 1 else []
    words += [word for word, used in (("auto", made.tree == "auto"), ("lookup", made.lookup)) if used]
    return ", ".join(words)


def measure(
    engine: Engine, prompt: Prompt, settings: DecodeSettings, made: Sequence[tuple[str, Decoder]], new_tokens: int
) -> list[dict[str, Any]]:
    """Prefill once and decode with each and return a row each, in order, with whether the tokens are plain decoding's.

    ``steps`` counts forward passes of the target; ``decided`` the tokens that they decided, bonus tokens included: the
    first token comes from the prefill and counts for none. Bytes are those of all hosts, work that of the drafting one.
    """
    handle = engine.prefill(prompt, max_new_tokens=new_tokens)
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
        "verify_s": drafting.get("verify_s", 0.0),
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
