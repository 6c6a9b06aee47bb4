"""Held-out recall: how many of the truly most important tokens a head's best ones are.

Shapes: T document tokens, E width of a head's input, K kv heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apb.compress.heads import Head
from apb.models.adapter import Adapter
from apb.train.labels import OnLayer, observe
from apb.train.prompts import Prompts
from apb.train.shards import top_count
from burst.kernels import Kernel

ANCHORS = {"plain": False, "embedded": True}  # whether the document has seen the question


@dataclass
class Recall:
    """Sums over prompts, layers and kv heads; ``of`` is by scorer, anchor and family."""

    found: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)

    def add(self, scorer: str, anchor: str, family: str, scores_KT: Tensor, importance_KT: Tensor) -> None:
        """Book one layer of one prompt: mean over kv heads of the share of the true top 10% in the scores' top 10%."""
        top = top_count(importance_KT.shape[-1])
        true_KT = torch.zeros_like(importance_KT, dtype=torch.bool)
        true_KT.scatter_(-1, importance_KT.topk(top).indices, True)
        share = true_KT.gather(-1, scores_KT.topk(top).indices).float().mean().item()
        self.found.setdefault((scorer, anchor, family), []).append(share)

    def mean(self, scorer: str, anchor: str, family: str | None = None) -> float:
        """Return the mean over all prompts and layers, of one family or of all."""
        shares = [
            share
            for (s, a, f), found in self.found.items()
            if (s, a) == (scorer, anchor) and family in (None, f)
            for share in found
        ]
        return sum(shares) / len(shares)

    def table(self) -> dict[str, dict[str, float]]:
        """Return every scorer's recall by anchor, and by anchor and family."""
        out: dict[str, dict[str, float]] = {}
        for scorer, anchor, family in sorted(self.found):
            row = out.setdefault(scorer, {})
            row[anchor] = round(self.mean(scorer, anchor), 4)
            row[f"{anchor}/{family}"] = round(self.mean(scorer, anchor, family), 4)
        return out


def measure(
    adapter: Adapter,
    kernel: Kernel,
    prompts: Prompts,
    count: int,
    scorers: Mapping[str, Sequence[Head]],
    on_prompt: Callable[[int, int], None],
) -> Recall:
    """Return the recall of each scorer, and of a random one, on held-out prompts with both kinds of anchor."""
    recall = Recall()
    done = 0
    for number in range(count):
        sample = prompts.sample(number, held_out=True)
        for anchor, embedded in ANCHORS.items():
            on_prompt(done, count * len(ANCHORS))
            book = _booking(recall, anchor, sample.family, scorers, torch.Generator().manual_seed(number))
            observe(adapter, kernel, sample, embedded=embedded, on_layer=book)
            done += 1
    on_prompt(done, done)
    return recall


def _booking(
    recall: Recall, anchor: str, family: str, scorers: Mapping[str, Sequence[Head]], rng: torch.Generator
) -> OnLayer:
    def on_layer(layer: int, x_TE: Tensor, importance_KT: Tensor) -> None:
        for name, heads in scorers.items():
            recall.add(name, anchor, family, heads[layer](x_TE).T, importance_KT)
        chance_KT = torch.rand(importance_KT.shape, generator=rng).to(importance_KT.device)
        recall.add("random", anchor, family, chance_KT, importance_KT)

    return on_layer
