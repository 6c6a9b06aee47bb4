"""Memory of a host, from the plan's numbers: weights, KV, and everything else that lives at once.

What freed memory leaves unused is not counted: C's allocator on Linux may keep as much again (``docs/log.md``).
"""

from __future__ import annotations

from dataclasses import dataclass

from apb.plan.plan import PrefillPlan


@dataclass(frozen=True)
class Generation:
    """An answer to be generated: at most ``new_tokens`` tokens, in trees of ``tree_tokens`` rows, root included.

    ``gathered``: the cache is moved to the deciding host first.
    """

    new_tokens: int = 0
    tree_tokens: int = 1
    gathered: bool = False


NOTHING = Generation()


def host_memory(plan: PrefillPlan, rank: int, answer: Generation = NOTHING) -> dict[str, int]:
    """Return the bytes that host ``rank`` needs: weights (the draft head's among them), KV (the head's too), and what
    else lives at once in the layer, or the step of decoding, that needs most."""
    s = plan.shape
    return {
        "weights": s.total_params * s.element_size + (plan.draft.weight_bytes if plan.draft is not None else 0),
        "kv": _kv(plan, rank, answer),
        "activations": max(_prefilling(plan, rank), _handing_over(plan, rank), _decoding(plan, rank, answer)),
    }


def _kv(plan: PrefillPlan, rank: int, answer: Generation) -> int:
    s, e, block, owner = plan.shape, plan.shape.element_size, plan.host_plans[rank].block_len, rank == plan.hosts - 1
    # A tree's rows stand behind the tail until its walk; its root is the last token decided.
    later = plan.lengths.query + answer.new_tokens
    kept = block * s.kv_bytes
    for kind, count in s.kinds.items():
        tail = kind.tail_bytes(later + answer.tree_tokens - 1, e, owner)
        pending = kind.tree_bytes(answer.tree_tokens, e) if answer.tree_tokens > 1 else 0
        kept += count * (tail + pending + kind.held_bytes(plan.lengths.context, e))
    if owner and answer.gathered and plan.hosts > 1:  # the shards are freed when all of them are here
        kept += (plan.lengths.context + plan.lengths.query) * s.kv_bytes
    if owner and plan.draft is not None:
        kept += plan.draft.cache_bytes(plan.lengths.context, later)
    return kept


def _prefilling(plan: PrefillPlan, rank: int) -> int:
    s, host = plan.shape, plan.host_plans[rank]
    together = host.tokens_run if plan.chunk_tokens is None else min(plan.chunk_tokens, host.tokens_run)
    fused = plan.fused and plan.chunk_tokens is None
    asked = _running(plan, plan.lengths.query, new=True)
    chosen = max((stop - start for start, stop in host.spans), default=0) if host.kept_rows else 0
    run = _running(plan, together, chosen=chosen)
    run = run + asked if fused else max(run, asked)
    tokens = together + plan.lengths.query if fused else max(together, plan.lengths.query)
    anchor = plan.anchor_len if plan.shared_anchor is not None else host.anchor_len
    passing = (plan.passing_rows(rank) + anchor) * s.widest_row * 2
    if plan.spread is not None and s.sharded:
        shapes = [kind.attention_shape(s.element_size) for kind in s.sharded]
        passing += max(plan.spread.workspace(rank, shape) for shape in shapes)
        if plan.hosts > 1 and together == host.tokens_run:  # in chunks, the whole rows' outputs have room for it
            passing += host.block_len * s.widest_row  # packed to be sent
    exchanged = [kind.workspace(plan.context, rank, s.element_size, tokens) for kind in s.replicated]
    passing = max([passing, *exchanged])
    features = plan.draft.feature_bytes(host.spans, plan.lengths.context) if plan.draft is not None else 0
    return run + passing + host.tokens_run * whole_row_bytes(plan, rank) + features


def _handing_over(plan: PrefillPlan, rank: int) -> int:
    """Bytes while the draft head makes its keys and values of what it takes over: features and its layer's input."""
    if plan.draft is None:
        return 0
    s, spans = plan.shape, plan.host_plans[rank].spans
    rows = plan.draft.rows(spans, plan.lengths.context)
    # Features fused, normed, the embedding, both side by side, and what the projections read.
    made = 6 * s.hidden * s.element_size + 2 * plan.draft.row_bytes
    return plan.draft.feature_bytes(spans, plan.lengths.context) + rows * made


def _decoding(plan: PrefillPlan, rank: int, answer: Generation) -> int:
    s = plan.shape
    logits = 0
    if rank == plan.hosts - 1:
        copied = 4 if s.element_size < 4 else 0  # to fp32
        logits = answer.tree_tokens * s.vocab * (s.element_size + copied)
    return _running(plan, answer.tree_tokens, new=True) + logits


def _running(plan: PrefillPlan, tokens: int, *, new: bool = False, chosen: int = 0) -> int:
    """Bytes of tokens that run through a layer; ``new``: over a cache; ``chosen``: of a block whose rows are chosen.

    The embedding, which the forward pass keeps, residual, norm and output of the hidden size, and the rotation; then
    either the MLP's gate, up and product, or attention's q, k, v before and after RoPE with two fp32 partial outputs,
    and keys and values while they are made of latents.
    """
    s, e = plan.shape, plan.shape.element_size
    mixing = [0]
    for kind in s.kinds:
        made = max(kind.expansion_bytes(plan.lengths.context, e), kind.scored_bytes(chosen, e))
        mixing.append(tokens * kind.step_work_bytes(e) if new else tokens * kind.row_work_bytes(e) + made)
    return tokens * (4 * s.hidden + 2 * s.rotary_dim) * e + max(tokens * s.mlp_row_bytes, *mixing)


def whole_row_bytes(plan: PrefillPlan, rank: int) -> int:
    """Bytes of a token that stay through a layer where chunks of the others run: the residual stream, its rotation,
    q, k and v; the output takes q's place, but not in exact attention over hosts."""
    s, host = plan.shape, plan.host_plans[rank]
    if plan.chunk_tokens is None or plan.chunk_tokens >= host.tokens_run or plan.alone(rank):
        return 0
    whole = max((kind.whole_row_bytes(s.element_size, exact=plan.spread is not None) for kind in s.kinds), default=0)
    return (s.hidden + 2 * s.rotary_dim) * s.element_size + whole
