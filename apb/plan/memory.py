"""Memory of a host, from the plan's numbers: weights, KV, and everything else that lives at once.

What freed memory leaves unused is not counted: C's allocator on Linux may keep as much again (``docs/log.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from apb.layers.base import LayerKind
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


def memory_by_kind(plan: PrefillPlan, rank: int, answer: Generation = NOTHING) -> dict[str, dict[str, int]]:
    """Return what layers of each kind take on a host: ``kept`` by all of them, and, by the one that takes most,
    ``exchanged`` (rows passed on, halos, maps of states: all buffers) and ``mixed`` (the tokens under way)."""
    found: dict[str, dict[str, int]] = {}
    for kind, count in plan.shape.kinds.items():
        mine = found.setdefault(kind.name, {"layers": 0, "kept": 0, "exchanged": 0, "mixed": 0})
        mine["layers"] += count
        mine["kept"] += count * _kept(plan, kind, rank, answer)
        mine["exchanged"] = max(mine["exchanged"], _exchanged(plan, kind, rank))
        mine["mixed"] = max(mine["mixed"], _together(plan, rank) * kind.row_work_bytes(plan.shape.element_size))
    return found


def _kv(plan: PrefillPlan, rank: int, answer: Generation) -> int:
    kept = sum(count * _kept(plan, kind, rank, answer) for kind, count in plan.shape.kinds.items())
    if rank == plan.hosts - 1 and plan.draft is not None:
        kept += plan.draft.cache_bytes(plan.lengths.context, plan.lengths.query + answer.new_tokens)
    return kept


def _kept(plan: PrefillPlan, kind: LayerKind, rank: int, answer: Generation) -> int:
    """Bytes that a host keeps of one layer."""
    e, owner, n = plan.shape.element_size, rank == plan.hosts - 1, plan.lengths
    # A tree's rows stand behind the tail until its walk; its root is the last token decided.
    kept = kind.tail_bytes(n.query + answer.new_tokens + answer.tree_tokens - 1, e, owner)
    kept += kind.held_bytes(n.context, e)
    kept += kind.tree_bytes(answer.tree_tokens, e) if answer.tree_tokens > 1 else 0
    if kind.sharded and kind.reads is None:
        rows = plan.host_plans[rank].block_len
        if owner and answer.gathered and plan.hosts > 1:  # the shards are freed when all of them are here
            rows += n.context + n.query
        kept += rows * kind.row_bytes(e)
    return kept


def _exchanged(plan: PrefillPlan, kind: LayerKind, rank: int) -> int:
    """Bytes of what one layer sends and receives while the context is prefilled."""
    s, host = plan.shape, plan.host_plans[rank]
    if not kind.sharded:
        return kind.workspace(plan.context, rank, s.element_size, _together(plan, rank))
    row = kind.row_bytes(s.element_size)
    anchor = plan.anchor_len if plan.shared_anchor is not None else host.anchor_len
    passing = (plan.passing_rows(rank) + anchor) * row * 2
    if plan.spread is not None:
        passing += plan.spread.workspace(rank, kind.attention_shape(s.element_size))
        if plan.hosts > 1:
            passing += host.block_len * row  # packed to be sent
    return passing


def _together(plan: PrefillPlan, rank: int) -> int:
    """Tokens of the context that a host runs at once."""
    run = plan.host_plans[rank].tokens_run
    return run if plan.chunk_tokens is None else min(plan.chunk_tokens, run)


def _prefilling(plan: PrefillPlan, rank: int) -> int:
    """Buffers of attention over hosts stay from layer to layer; those of other exchanges live in their layer alone."""
    host = plan.host_plans[rank]
    stays = max((_exchanged(plan, kind, rank) for kind in plan.shape.sharded), default=0)
    chosen = max((stop - start for start, stop in host.spans), default=0) if host.kept_rows else 0
    beside = stays if plan.spread is None else 0
    freed = {kind: max(0, _exchanged(plan, kind, rank) - beside) for kind in plan.shape.replicated}
    run = _running(plan, _together(plan, rank), chosen=chosen, freed=freed)
    asked = _running(plan, plan.lengths.query, new=True)
    run = run + asked if plan.fused and plan.chunk_tokens is None else max(run, asked)
    features = plan.draft.feature_bytes(host.spans, plan.lengths.context) if plan.draft is not None else 0
    return run + stays + host.tokens_run * whole_row_bytes(plan, rank) + features


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


def _running(
    plan: PrefillPlan,
    tokens: int,
    *,
    new: bool = False,
    chosen: int = 0,
    freed: Mapping[LayerKind, int] = MappingProxyType({}),
) -> int:
    """Bytes of tokens that run through a layer; ``new``: over a cache; ``chosen``: of a block whose rows are chosen;
    ``freed``: what exchanges of a kind take beside.

    The embedding, which the forward pass keeps, residual, norm and output of the hidden size, and the rotation; then
    either the MLP's gate, up and product, or attention's q, k, v before and after RoPE with two fp32 partial outputs,
    and keys and values while they are made of latents.
    """
    s, e = plan.shape, plan.shape.element_size
    mixing = [0]
    for kind in s.kinds:
        made = max(kind.expansion_bytes(plan.lengths.context, e), kind.scored_bytes(chosen, e)) + freed.get(kind, 0)
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
