"""``burst.attention``: exact attention over tokens that are spread over ranks, with its gradients.

Shapes: B batch, H query heads, K kv heads, S own queries, T own keys, D head dim, E value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burst.execution.calls import AttentionCall, make_call
from burst.execution.execute import Execution
from burst.execution.options import AttentionOptions
from burst.layouts.layout import Layout
from burst.planner.topology import Topology
from burst.schedules import Schedule
from burst.transport import Transport


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    transport: Transport,
    layout: Layout,
    schedule: str | Schedule = "auto",
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
    keys: Layout | None = None,
    forward: str = "auto",
    backward: str = "auto",
    ulysses: int | None = None,
    topology: Topology | None = None,
    accurate: bool = False,
    checkpoint: float | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend this rank's queries to the keys of all ranks: softmax(scale q k^T) v, exact, differentiable.

    Every rank calls it with its own rows and the same options. All ranks call backward if any does. A rank
    without tokens takes part with S = 0. Together they get what one device would compute on the whole:

        lay = burst.layout("zigzag", n_tokens, transport.world)   # the same on every rank
        x = lay.shard(embeddings, transport.rank, dim=1)          # this rank's rows; the labels likewise
        position_ids = lay.positions(transport.rank)              # for the rotary embedding
        ...                                                       # projections to q, k, v, (B, heads, S, D)
        out = burst.attention(q, k, v, transport=transport, layout=lay)
        loss.backward()                                           # then sum weights' gradients over ranks

    Parameters
        q, k, v     (B, H, S, D), (B, K, S, D), (B, K, S, E); K divides H, keys are not repeated. fp64, fp32,
                    bf16 or fp16, any strides. Gradients have the same type and are summed in fp32 (fp64).
        transport   the connection of the ranks: ``burst.run_virtual``, ``burst.transport.process_group``.
        layout      the ranks' tokens, and the ends of the documents that are packed into the sequence.
        schedule    ring, double_ring, burst, allgather, ulysses, usp; ``auto``: the one that is predicted to
                    be fastest; or a forward schedule made by ``burst.schedules.schedule`` for this call.
        causal      a query sees keys up to its own position, in its own document.
        scale       1/sqrt(D) when None.
        window      a query sees its last ``window`` keys, its own included (both sides when not causal).
        sinks       (H,), a learned logit a head that joins each softmax's denominator. Its gradient is this
                    rank's share, like that of any weight: sum it over ranks.
        soft_cap    scores become soft_cap * tanh(score / soft_cap) before the mask; sinks are not capped.
        keys        the layout of k and v where they hold history before ``layout``'s chunk; see
                    ``Layout.extend``.
        forward     the traveller: kv, or q (whose partial outputs come back); auto: kv, but with history
                    and in ``burst`` the cheaper of the two by bytes.
        backward    the traveller: kv (and its gradients), or q (with dO, two numbers a row, and dQ); auto: kv,
                    but in ``burst`` the cheaper of the two by bytes.
        ulysses     ranks that share tokens by heads, for ``usp`` alone; the ranks of a node when None.
        topology    links and speeds that ``auto`` plans with; guessed from the transport when None.
        accurate    partial results in fp32, by fp32 kernels: out and gradients are rounded once, at the end.
        checkpoint  keep this fraction of the outputs for the backward, those of the last tokens, and compute
                    the rest again: (1 - checkpoint)^2 of a causal forward. None keeps all.
        kernel      auto, cpu, cuda, cudnn, flash_attn, reference.
        return_lse  also return the log-sum-exp (B, H, S), fp32 or fp64, which carries no gradient.

    Returns ``out`` (B, H, S, E) in q's dtype. The backward keeps q, k, v, out and lse, nothing of size S x N.
    Raises UserError for what does not fit together on this rank, HostFailure (rank, step, peer) when ranks
    disagree or one of them fails. Ranks compare shapes, types, options (``return_lse`` too) and schedules before
    the first message of every new kind of call. Under several threads that share a device (virtual ranks),
    ``burst.run_virtual`` sees to it that a backward does not wait inside the device's one autograd thread.

    Source: Ring Attention arXiv 2310.01889; BurstAttention arXiv 2403.09347; DeepSpeed-Ulysses arXiv
    2309.14509; USP arXiv 2405.07719.
    """
    options = AttentionOptions(
        layout=layout,
        schedule=schedule,
        causal=causal,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        keys=keys,
        forward=forward,
        backward=backward,
        ulysses=ulysses,
        topology=topology,
        accurate=accurate,
        checkpoint=checkpoint,
        kernel=kernel,
        return_lse=return_lse,
    )
    call = make_call(q, k, v, sinks, transport, options)
    if call.backward is None:
        with torch.no_grad():
            run = _forward_run(q, k, v, sinks, call)
            out, _ = run.forward()
            return (out, run.own_lse()) if return_lse else out
    out, lse = _AttentionFunction.apply(q, k, v, sinks, call, return_lse)
    return (out, lse) if return_lse else out


def _forward_run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttentionCall) -> Execution:
    return Execution(call.forward, call.transport, call.blocks, call.form, {"q": q, "k": k, "v": v}, sinks=sinks)


class _AttentionFunction(torch.autograd.Function):
    """The schedule's forward, and its backward by scores computed again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: AttentionCall, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        run = _forward_run(q, k, v, sinks, call)
        out, lse = run.forward()
        # In head groups the rank's work, and so the backward's start, is other rows and heads than its own.
        kept: tuple[Tensor, ...] = (*(run.working[name] for name in ("q", "k", "v", "out")), lse)
        if call.kept is not None:
            kept = *kept[:3], *(x.index_select(2, call.kept) for x in kept[3:])
        ctx.call = call
        ctx.save_for_backward(*kept, sinks)
        if not return_lse:
            return out, None
        own_lse = run.own_lse()
        ctx.mark_non_differentiable(own_lse)
        return out, own_lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        call: AttentionCall = ctx.call
        assert call.backward is not None
        q, k, v, out, lse, sinks = ctx.saved_tensors
        if call.again is not None:
            out, lse = _complete(q, k, v, out, lse, sinks, call)
        own = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
        run = Execution(call.backward, call.transport, call.blocks, call.form, own)
        dq, dk, dv = (x.to(call.form.dtype) for x in run.backward())
        dsinks = None if sinks is None else run.sink_gradient(sinks)
        return dq, dk, dv, dsinks, None, None


def _complete(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Compute the first tokens' out and lse again and join them with the kept ones, in the old order."""
    assert call.again is not None and call.dropped is not None and call.kept is not None
    own = {name: x.index_select(2, call.dropped) for name, x in (("q", q), ("k", k), ("v", v))}
    run = Execution(call.again, call.transport, call.blocks, call.form, own, sinks=sinks, resume=True)
    order = torch.cat([call.dropped, call.kept]).argsort()
    first_out, first_lse = run.forward()
    return (
        torch.cat([first_out, out], 2).index_select(2, order),
        torch.cat([first_lse, lse], 2).index_select(2, order),
    )
