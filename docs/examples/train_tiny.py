"""Train a tiny language model for two steps, its sequence spread over 4 ranks, and compare with one rank.

    python docs/examples/train_tiny.py                                     # 4 virtual ranks in this process
    torchrun --nproc-per-node=4 docs/examples/train_tiny.py --processes    # 4 gloo processes

What it asks of a training script: shard tokens and labels, give rotary embeddings the layout's positions, use
``burst.attention``, and sum the weights' gradients over ranks.

Shapes: B batch, H query heads, K kv heads, N tokens, S own tokens, D head dim, M model dim, V vocabulary.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import burst
from burst.layouts.layout import Layout
from burst.transport import Transport
from burst.transport.process_group import ProcessGroupTransport

RANKS, STEPS = 4, 2
B, H, K, N, D, V, LAYERS = 2, 4, 2, 250, 16, 100, 2
M = H * D


def rotate(x_BHSD: Tensor, positions_S: Tensor) -> Tensor:
    """Turn pairs of elements by an angle that grows with the position: a rotary embedding."""
    speed_D2 = 10_000.0 ** (-torch.arange(0, D, 2, dtype=x_BHSD.dtype) / D)
    angle_SD2 = positions_S.to(x_BHSD.dtype)[:, None] * speed_D2
    a, b = x_BHSD.chunk(2, -1)
    return torch.cat([a * angle_SD2.cos() - b * angle_SD2.sin(), b * angle_SD2.cos() + a * angle_SD2.sin()], -1)


class Block(nn.Module):
    """Attention with a learned sink a head, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(M), nn.LayerNorm(M)])
        self.qkv, self.out = nn.Linear(M, (H + 2 * K) * D, bias=False), nn.Linear(M, M, bias=False)
        self.mlp = nn.Sequential(nn.Linear(M, 2 * M), nn.GELU(), nn.Linear(2 * M, M))
        self.sinks = nn.Parameter(torch.zeros(H))

    def forward(self, x_BSM: Tensor, transport: Transport, layout: Layout) -> Tensor:
        heads_BHSD = self.qkv(self.norms[0](x_BSM)).unflatten(-1, (-1, D)).transpose(1, 2)
        q, k, v = heads_BHSD.split([H, K, K], 1)
        positions_S = layout.document_positions(transport.rank)
        out_BHSD = burst.attention(
            rotate(q, positions_S),
            rotate(k, positions_S),
            v,
            transport=transport,
            layout=layout,
            sinks=self.sinks,
        )
        x_BSM = x_BSM + self.out(out_BHSD.transpose(1, 2).flatten(2))
        return x_BSM + self.mlp(self.norms[1](x_BSM))


class Model(nn.Module):
    """A tiny decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, M), nn.Linear(M, V, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, ids_BS: Tensor, transport: Transport, layout: Layout) -> Tensor:
        x_BSM = self.embedding(ids_BS)
        for block in self.blocks:
            x_BSM = block(x_BSM, transport, layout)
        return self.head(x_BSM)


def step(model: Model, optimizer: torch.optim.Optimizer, tokens: Tensor, transport: Transport, layout: Layout) -> float:
    """Take one optimiser step on this rank's part of ``tokens`` (B, N + 1); return the loss of the whole."""
    ids_BS = layout.shard(tokens[:, :-1], transport.rank, dim=1)
    labels_BS = layout.shard(tokens[:, 1:], transport.rank, dim=1)  # shifted before they are spread out
    logits_BSV = model(ids_BS, transport, layout)
    # The mean over all tokens of all ranks: each rank contributes its sum.
    loss = cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum") / (B * N)
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = total(parameter.grad, transport)
    optimizer.step()
    return total(loss.detach().reshape(1), transport).item()


def total(x: Tensor, transport: Transport) -> Tensor:
    """Sum a tensor over ranks, in rank order; on processes ``dist.all_reduce`` does as well."""
    parts = transport.all_gather(x, [x.shape] * transport.world, kind="gradients", step="sum").wait()
    return torch.stack(parts).sum(0)


def train(transport: Transport, model: Model, tokens: Tensor) -> tuple[list[float], Model]:
    """Train a copy of the model; return the losses and the copy."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    where = burst.layout("zigzag", N, transport.world, cu_seqlens=(0, 90, N))  # two packed documents
    return [step(model, optimizer, tokens, transport, where) for _ in range(STEPS)], model


def main(processes: bool) -> bool:
    """Train on one rank and on four; say whether losses and weights agree."""
    torch.manual_seed(0)
    model, tokens = Model().double(), torch.randint(V, (B, N + 1))
    one_losses, one = burst.run_virtual(1, lambda t: train(t, model, tokens))[0]
    if processes:
        dist.init_process_group("gloo")  # torchrun has set the environment
        transport = ProcessGroupTransport(timeout_s=60)
        results = [train(transport, model, tokens)]
        transport.close()
    else:
        results = burst.run_virtual(RANKS, lambda t: train(t, model, tokens))
    ok = True
    for losses, four in results:
        pairs = zip(one.parameters(), four.parameters(), strict=True)
        error = max((x - y).abs().max().item() for x, y in pairs)
        loss_error = max(abs(x - y) for x, y in zip(one_losses, losses, strict=True))
        sys.stdout.write(f"losses {losses}, one rank {one_losses}, largest difference of a weight {error:.1e}\n")
        ok = ok and error <= 1e-9 and loss_error <= 1e-12
    return ok


if __name__ == "__main__":
    sys.exit(0 if main("--processes" in sys.argv) else 1)
