"""A linear layer over chunks of a host's tokens, beside an anchor: the same as whole, and the same bytes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apb.layers.base import Place
from apb.layers.linear import LinearPrefill
from apb.layers.mixing import LinearCache
from apb.layers.sharding import Segment, Sharding
from burst.kernels import kernel
from burst.transport import Transport, VirtualWorld
from tests.layers.test_linear import FAMILIES, apart, hidden, kept, mixed, mixer, positions, sharded, whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ("contiguous", "zigzag", "uneven"))
def test_chunks_give_what_the_whole_gives(family: str, name: str) -> None:
    """An anchor over shares, then the context; chunks cut across stretches and sequences."""
    for tokens, hosts in ((13, 3), (131, 4)):
        context, anchor = sharded(name, tokens, hosts), sharded("contiguous", 2 * hosts, hosts)
        a, b = whole(family, 2 * hosts), whole(family, tokens)
        order = torch.cat([positions(context, rank) for rank in range(hosts)]).argsort()
        bytes_sent = []
        for size in (None, 1, 3, 50):
            world = VirtualWorld(hosts)
            found = world.run(functools.partial(beside_an_anchor, family, anchor, context, size))
            parts = [torch.cat([each[0][i] for each in found]) for i in range(4)]
            assert apart([*parts[:2], *(x[order] for x in parts[2:])], [*a[:2], *b[:2]]) <= 1e-12
            assert all(apart(kept(each[1]), kept(b[2])) <= 1e-12 for each in found)
            bytes_sent.append([t.ledger.by_kind() for t in world.transports])
        assert all(sent == bytes_sent[0] for sent in bytes_sent)


def beside_an_anchor(
    family: str, anchor: Sharding, context: Sharding, size: int | None, t: Transport
) -> tuple[list[Tensor], LinearCache]:
    """Run one host's share of an anchor and its part of a context; return both outputs of both, and its cache."""
    module, kind = mixer(family)
    first, at = positions(anchor, t.rank), positions(context, t.rank)
    rows = len(first)
    segments = [Segment(0, rows, anchor, False), Segment(rows, rows + len(at), context, True)]
    run = kind.prefill(segments, Place(t, kernel("reference")))
    assert isinstance(run, LinearPrefill)
    x_BSE = torch.cat([hidden(anchor.length)[:, first], hidden(context.length)[:, at]], dim=1)
    outs = [mixed(module, x_BSE, run)] if size is None else chunked(module, x_BSE, run, size)
    conv, scan = (torch.cat(each) for each in zip(*outs, strict=True))
    return [conv[:rows], scan[:rows], conv[rows:], scan[rows:]], run.cache


class Stopped(Exception):
    """A layer's input of the convolution is here."""


def chunked(module: nn.Module, x_BSE: Tensor, run: LinearPrefill, size: int) -> list[tuple[Tensor, Tensor]]:
    """Run a layer in chunks; return the outputs of each."""
    chunks, inputs = run.chunks(), list[Tensor]()

    def taking(call: Any) -> Tensor:
        inputs.append(call.x_BCS)
        raise Stopped

    for start, stop in chunks.wanted:
        with contextlib.suppress(Stopped):
            mixed(module, x_BSE[:, start:stop], taking)
    chunks.exchange(inputs, 0)
    starts = range(0, x_BSE.shape[1], size)
    for start in starts:
        mixed(module, x_BSE[:, start : start + size], lambda call, at=start: chunks(call, at))
    chunks.settle(0)
    return [mixed(module, x_BSE[:, at : at + size], lambda call, at=at: chunks(call, at)) for at in starts]
