"""What compressors score, written out token by token: the other side of their tests.

Shapes: H query heads, K kv heads, L block tokens, Q question tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.twin import Seen

Turn = Callable[[Tensor, int, int], Tensor]  # rotated queries or keys (heads, S, D), positions, layer


@dataclass(frozen=True)
class Query:
    """The question's attention, its mean, and a max-pool."""

    window: int = 5
    needs_question: bool = True

    def __call__(self, block: Seen) -> Tensor:
        rows = []
        for j, heads in enumerate(_groups(block)):
            found = [block.question_HQD[h] @ block.k_KLD[j].T * block.scale for h in heads]
            rows.append(torch.cat([x.softmax(-1) for x in found]).mean(0))
        return _pooled(torch.stack(rows), self.window, max)


@dataclass(frozen=True)
class SnapKV:
    """What the last tokens look at, each token's mean over those that come after it, then over its neighbours."""

    observers: int = 32
    window: int = 5
    needs_question: bool = False

    def __call__(self, block: Seen) -> Tensor:
        length = block.k_KLD.shape[1]
        got: list[list[list[float]]] = [[[] for _ in range(length)] for _ in _groups(block)]
        for j, heads in enumerate(_groups(block)):
            for i in range(max(0, length - self.observers), length):
                for h in heads:
                    seen = (block.k_KLD[j, : i + 1] @ block.q_HLD[h, i] * block.scale).softmax(0)
                    for t, weight in enumerate(seen.tolist()):
                        got[j][t].append(weight)
        scores = [[sum(weights) / len(weights) for weights in tokens] for tokens in got]
        return _pooled(torch.tensor(scores, dtype=torch.float64), self.window, lambda near: sum(near) / len(near))


@dataclass(frozen=True)
class Expected:
    """Attention of normal queries behind the context, times the norm of the values; ``turn`` rotates."""

    turn: Turn
    future: int = 64
    needs_question: bool = False

    def __call__(self, block: Seen) -> Tensor:
        length, width = block.k_KLD.shape[1:]
        plain = [self.turn(block.q_HLD[:, t : t + 1], -block.start - t, block.layer) for t in range(length)]
        q_HLD = torch.cat(plain, dim=1)
        steps = [round(i * (self.future - 1) / 15) for i in range(16)]
        units = torch.eye(width, dtype=q_HLD.dtype)[None]
        turned = torch.stack([self.turn(units, block.end + step, block.layer)[0] for step in steps]).mean(0)
        rows = []
        for j, heads in enumerate(_groups(block)):
            chances = []
            for h in heads:
                ahead = q_HLD[h] @ turned
                covariance = torch.cov(ahead.T, correction=0)
                near = [
                    (k @ ahead.mean(0) * block.scale + k @ covariance @ k * block.scale**2 / 2).item()
                    for k in block.k_KLD[j]
                ]
                chances.append(torch.tensor(near, dtype=q_HLD.dtype).softmax(0))
            rows.append(sum(chances) / len(chances) * block.v_KLD[j].pow(2).sum(-1).sqrt())
        return torch.stack(rows)


@dataclass(frozen=True)
class Retaining:
    """A network of plain tensors ``layers[i] = (fc1, bias, fc2)``; with ``turn``, keys are met from the end."""

    layers: tuple[tuple[Tensor, Tensor | None, Tensor], ...]
    turn: Turn | None
    window: int = 1
    needs_question: bool = False

    def __call__(self, block: Seen) -> Tensor:
        q_LE, k_LE, v_LE = block.raw_LE
        if self.turn is not None:
            far = self.turn(block.k_KLD, -block.end, block.layer)
            k_LE = torch.cat(list(far), dim=-1)
        x = torch.cat([q_LE, k_LE, v_LE], dim=-1)
        fc1, bias, fc2 = (None if part is None else part.to(x.dtype) for part in self.layers[block.layer])
        assert fc1 is not None and fc2 is not None
        hidden = x @ fc1.T + (0 if bias is None else bias)
        return _pooled((hidden / (1 + (-hidden).exp()) @ fc2.T).T, self.window, max)


def _groups(block: Seen) -> list[range]:
    group = block.q_HLD.shape[0] // block.k_KLD.shape[0]
    return [range(j * group, (j + 1) * group) for j in range(block.k_KLD.shape[0])]


def _pooled(scores: Tensor, window: int, of: Callable[[list[float]], float]) -> Tensor:
    reach = window // 2
    rows = [[of(row[max(0, t - reach) : t + reach + 1]) for t in range(len(row))] for row in scores.double().tolist()]
    assert not any(math.isnan(x) for row in rows for x in row)
    return torch.tensor(rows, dtype=torch.float64)
