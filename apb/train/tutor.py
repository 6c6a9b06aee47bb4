"""Training of a draft head on kept answers: batches, losses, the optimizer, and checkpoints that go on exactly.

Shapes: B sequences, S tokens, E hidden size, N tokens with a loss, V rows of the LM head in the loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.draft.base import Target
from apb.draft.eagle import EagleHead
from apb.train.features import FeatureSample
from apb.train.unroll import Divergence, unroll
from burst.errors import in_range

_CLIP = 1.0  # largest gradient norm
_SLOW = 0.1  # of the learning rate, for queries and keys
_POOL = 16  # batches whose samples are sorted by length among themselves, so that little is padding


@dataclass(frozen=True)
class TutorRecipe:
    """Settings of training a head: SmoothL1 on features and KL on the ``vocab`` most frequent ids with ``negatives``
    drawn from the others; Muon (AdamW for the norm) with linear warm-up and cosine decay; the last part of the steps is
    unrolled on the head's own features.

    Source: EAGLE (arXiv 2401.15077) section 4 for the two losses and the noise, EAGLE-3 (arXiv 2503.01840) for
    unrolling and its weights; positions after LongSpec (arXiv 2502.17421).
    """

    epochs: int = 5
    batch: int = 1536  # tokens of a step
    lr: float = 3e-3
    weight_decay: float = 0.05
    feature_weight: float = 0.1  # of SmoothL1, beside KL
    noise: float = 0.2  # width of the uniform noise on features, in their standard deviations
    vocab: int = 6144
    negatives: int = 768
    unrolled: float = 0.35  # share of the steps
    depth: int = 3  # steps of an unrolled pass
    decay: float = 0.8  # weight of each further one
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("epochs", "batch", "lr", "vocab", "depth"):
            value = getattr(self, key)
            in_range(key, value, value > 0 and math.isfinite(value), "more than 0")
        in_range("unrolled", self.unrolled, 0.0 <= self.unrolled <= 1.0, "a share of the steps, 0 to 1")


class Tutor:
    """Trains a head for ``target`` on samples; what is resumed ends with the weights of what was never interrupted.

    ``ranked_V`` are the target's ids, most frequent first. Training goes on from ``start``, or from random weights.
    """

    def __init__(
        self,
        recipe: TutorRecipe,
        target: Target,
        samples: Sequence[FeatureSample],
        ranked_V: Tensor,
        window: int,
        sinks: int,
        start: EagleHead | None = None,
    ) -> None:
        self._recipe, self._target, self._samples, self._ranked_V = recipe, target, samples, ranked_V
        # Embeddings are far smaller than features: while it learns, the head sees them at about the size of one.
        self._gain = 1.0 / float(target.embedding_WE.float().std())
        scaled = replace(target, embedding_scale=target.embedding_scale * self._gain)
        if start is None:
            head = EagleHead.fresh(scaled, window=window, sinks=sinks, seed=recipe.seed)
        else:
            head = start.absorbing(1 / self._gain, scaled).requires_grad_(True)
            head.window, head.sinks = window, sinks
        self._head = head
        self._batches = [b for epoch in range(recipe.epochs) for b in self._epoch(epoch)]
        self._scale = float(torch.cat([s.features_SE[s.prompt :] for s in samples[:64]]).float().std())
        self._rows_VE, bias = target.head_WE.to(torch.bfloat16), target.head_bias_W
        self._bias_V = None if bias is None else bias.to(torch.bfloat16)
        # What an EAGLE head attends with is never normed: at full speed its softmax saturates within fifty steps.
        slow = [p for name, p in head.named_parameters() if p.dim() > 1 and ("q_proj" in name or "k_proj" in name)]
        matrices = [p for p in head.parameters() if p.dim() > 1 and all(p is not q for q in slow)]
        vectors = [p for p in head.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "speed": 1.0}, {"params": slow, "speed": _SLOW}]
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(vectors, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.step = 0

    def run(self, checkpoint: Path, every: int, on_step: Callable[[int, int, float], None]) -> EagleHead:
        """Train to the end, from the checkpoint if there is one, and return the head.

        ``every``: steps between checkpoints. ``on_step(done, total, loss)``.
        """
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self._head.load_state_dict(state["head"])
            for optimizer, found in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(found)
            self.step = state["step"]
        while self.step < len(self._batches):
            loss = self._train(self._batches[self.step])
            self.step += 1
            on_step(self.step, len(self._batches), loss)
            if self.step % every == 0 or self.step == len(self._batches):
                self._save(checkpoint)
        return self.head

    @property
    def head(self) -> EagleHead:
        """The head as it is now, in fp32, for the target itself."""
        return self._head.absorbing(self._gain, self._target)

    def _save(self, checkpoint: Path) -> None:
        unfinished = checkpoint.with_suffix(".part")
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        state = {"head": self._head.state_dict(), "optimizers": optimizers, "step": self.step}
        torch.save(state, unfinished)
        os.replace(unfinished, checkpoint)

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Return an epoch's batches of about ``batch`` tokens, samples of like length together."""
        rng = torch.Generator().manual_seed(self._recipe.seed * 1009 + epoch)
        order = torch.randperm(len(self._samples), generator=rng).tolist()
        mean = sum(len(s.ids_S) for s in self._samples) / len(self._samples)
        size = max(1, round(self._recipe.batch / mean))
        batches = []
        for pool in _cut(order, size * _POOL):
            pool.sort(key=lambda i: len(self._samples[i].ids_S))
            batches += _cut(pool, size)
        return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]

    def _train(self, batch: Sequence[int]) -> float:
        recipe, total = self._recipe, len(self._batches)
        warmup = max(1, total // 25)
        rate = min((self.step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * self.step / total)))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate * group.get("speed", 1.0)
            optimizer.zero_grad(set_to_none=True)
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        depth = recipe.depth if self.step >= total * (1 - recipe.unrolled) else 1
        loss = self._loss([self._samples[i] for i in batch], depth, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._head.parameters(), _CLIP)
        for optimizer in self._optimizers:
            optimizer.step()
        return loss.item()

    def _loss(self, samples: Sequence[FeatureSample], depth: int, rng: torch.Generator) -> Tensor:
        recipe, device = self._recipe, self._target.device
        longest = max(len(s.ids_S) for s in samples)
        shape = (len(samples), longest)
        ids_BS = torch.zeros(shape, dtype=torch.int64)
        features_BSE = torch.zeros((*shape, samples[0].features_SE.shape[1]))
        answer_BS = torch.zeros(shape, dtype=torch.bool)  # rows whose guess is a token of the answer
        for row, s in enumerate(samples):
            ids_BS[row, : len(s.ids_S) - 1] = s.ids_S[1:]
            features_BSE[row, : len(s.ids_S)] = s.features_SE
            answer_BS[row, s.prompt - 1 : len(s.ids_S) - 1] = True
        noise_BSE = (torch.rand(features_BSE.shape, generator=rng) - 0.5) * (recipe.noise * self._scale)
        subset_V = self._subset(rng)
        rows_VE, bias_V = self._rows_VE[subset_V], None if self._bias_V is None else self._bias_V[subset_V]
        kept_S, positions_S = self._seen(longest - 1, min(s.prompt for s in samples), rng)
        hidden_BSE = (features_BSE + noise_BSE)[:, kept_S].to(device)
        true_BSE, ids_BS = features_BSE[:, kept_S + 1].to(device), ids_BS[:, kept_S].to(device)
        answer_BS = answer_BS[:, kept_S].to(device)
        total, weights = true_BSE.new_zeros(()), 0.0
        with torch.autocast(device.type, dtype=torch.bfloat16):
            outs = unroll(self._head, hidden_BSE, ids_BS, positions_S.to(device), depth)
            for step, out_BSE in enumerate(outs):
                chain_BS = answer_BS.clone()
                for _ in range(step):  # it began in the answer
                    chain_BS[:, 1:] &= chain_BS[:, :-1].clone()
                    chain_BS[:, 0] = False
                out_NE, true_NE = out_BSE[chain_BS].float(), true_BSE[chain_BS]
                weight = recipe.decay**step
                near = F.smooth_l1_loss(out_NE, true_NE)
                total = total + weight * (
                    recipe.feature_weight * near + self._divergence(out_NE, true_NE, rows_VE, bias_V)
                )
                weights += weight
        return total / weights

    def _divergence(self, out_NE: Tensor, true_NE: Tensor, rows_VE: Tensor, bias_V: Tensor | None) -> Tensor:
        t = self._target
        loss_N: Tensor = Divergence.apply(out_NE, true_NE, rows_VE, bias_V, t.logit_scale, t.soft_cap)
        return loss_N.mean()

    def _subset(self, rng: torch.Generator) -> Tensor:
        """Return the ids in this step's loss: the most frequent, and some of the others."""
        ranked_V, vocab = self._ranked_V, min(self._recipe.vocab, len(self._ranked_V))
        others = len(ranked_V) - vocab
        if not others:
            return ranked_V
        drawn = torch.randint(others, (self._recipe.negatives,), generator=rng).unique()
        return torch.cat([ranked_V[:vocab], ranked_V[vocab:][drawn]])

    def _seen(self, rows: int, prompt: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return which rows of the sequences the head sees, and at which positions.

        Half the time all, as they stand; else as from deep in a long context: behind the first positions a stretch of
        the prompts is out of the window, and the rest has moved on, up to the target's last position. Moves are uniform
        in their logarithm.
        """
        kept_S, sinks = torch.arange(rows), self._head.sinks
        room = self._target.shape.max_positions - rows
        deep, hidden, moved = torch.rand(3, generator=rng).tolist()
        if deep < 0.5 or room < 1 or prompt <= sinks:
            return kept_S, kept_S
        kept_S = torch.cat([kept_S[:sinks], kept_S[sinks + int(hidden * (prompt - sinks)) :]])
        return kept_S, torch.where(kept_S < sinks, kept_S, kept_S + int(room**moved))


def _cut(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
