"""The dense twin: a distributed prefill and its query phase as one forward pass with an explicit mask.

Every block, each with an anchor of its own, and the question stand one after another in one sequence; a boolean mask
over all of it says who sees whom, per layer and kv head, and attention is one plain softmax. Written from the
description of the method, without the code under test: lengths, selection and masks are worked out again. Only the
model, and the numbers of random selection, are the same.

Shapes: H query heads, K kv heads, N tokens of the sequence, L block tokens, Q question tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from apb.compress.base import Candidates
from apb.compress.random import Random
from apb.layers.base import LayerKind
from apb.layers.call import AttentionCall, Call
from apb.layers.mixing import ConvCall, ScanCall
from apb.layers.rows import Projections
from apb.layers.softmax import Softmax
from apb.layers.window import Window
from apb.models.adapter import Adapter
from apb.prompt.prompt import Prompt

ANCHOR, BLOCK, QUERY = 0, 1, 2
Rotate = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Seen:
    """One block in one layer, for a score that is given from outside; queries and keys are rotated."""

    layer: int
    number: int  # of the block, in position order
    q_HLD: Tensor
    k_KLD: Tensor
    v_KLD: Tensor
    raw_LE: tuple[Tensor, Tensor, Tensor]  # q, k and v before rotation
    question_HQD: Tensor  # the anchor's question, turned on to where it really stands
    scale: float
    start: int  # the block's first position
    end: int  # the context's length


class Scorer(Protocol):
    """A selection rule that the twin does not know by name: scores (K, L) of a block."""

    needs_question: bool

    def __call__(self, block: Seen) -> Tensor: ...


Select = str | Scorer | None


@dataclass(frozen=True)
class Sizes:
    """All lengths of a prefill, worked out from the rules in words."""

    spans: tuple[tuple[int, int], ...]  # context positions of each block
    anchor: int  # l_a
    skip: int  # s
    question: int  # l_q in the anchor
    rows: tuple[int, ...]  # rows that each block offers to later hosts
    beside: tuple[int, ...]  # tokens run beside each block: its copy of the anchor, or block 0's extra head
    held: tuple[tuple[int, ...], ...]  # blocks of each host
    blind: frozenset[int] = frozenset()  # blocks that do not see the rows that earlier ones pass on


def sizes(
    strategy: str,
    prompt: Prompt,
    hosts: int,
    *,
    select: Select = None,
    anchor_len: int | None = None,
    passing_len: int | None = None,
    published: bool = False,
) -> Sizes:
    """Return the lengths for ``full``, ``star``, ``apb`` or ``spava`` (``select``: query, random, recent or norm)."""
    n, s = len(prompt.context_ids), prompt.head
    l_q = len(prompt.question.ids) if prompt.question else 0
    count = min(2 * hosts, n) if strategy == "spava" and hosts > 1 else hosts
    longer = n % count  # the first n mod count blocks hold one token more
    lengths = [n // count + 1] * longer + [n // count] * (count - longer)
    starts = [sum(lengths[:h]) for h in range(count)]
    spans = tuple((a, a + size) for a, size in zip(starts, lengths, strict=True))
    held: tuple[tuple[int, ...], ...] = tuple((h,) for h in range(hosts))
    if count > hosts:  # the first block goes with the last one, and so on inwards
        held = tuple(tuple(b for b in (h, 2 * hosts - 1 - h) if b < count) for h in range(hosts))
    if hosts == 1 or strategy == "full":
        return Sizes(spans, 0, 0, 0, (0,) * hosts, (0,) * hosts, held)
    if strategy == "star":  # the anchor is the first block, the question is not in it
        return Sizes(spans, lengths[0], 0, 0, (0,) * hosts, (0,) + (lengths[0],) * (hosts - 1), held)
    s = min(s, lengths[0])
    quarter, eighth = (n // 64, n // 64) if published else (n // hosts // 4, n // hosts // 8)
    # With a copy of the question in the context, the anchor is the context's beginning, and embeds none.
    least, most = (s + prompt.copied, lengths[0]) if prompt.copied else (s + l_q, lengths[0] + l_q)
    l_a = anchor_len if anchor_len is not None else min(max(quarter, least), most)
    l_p = passing_len if passing_len is not None else max(1, eighth)
    if strategy == "spava":
        l_p = (l_p + 1) // 2
    rows = [min(l_p, size) for size in lengths]
    rows[0] = min(l_p, max(0, lengths[0] - l_a))  # the first l_a positions stand in every anchor already
    asks = select == "query" or getattr(select, "needs_question", False)
    head = s + l_q if asks and rows[0] else 0
    return Sizes(spans, l_a, s, l_q, tuple(rows), (head,) + (l_a,) * (count - 1), held)


@dataclass
class Twin:
    """What the twin found: the last token's logits; by layer all keys and values and what was selected."""

    logits: Tensor
    sizes: Sizes
    rows: list[Tensor]  # of the sequence: what each host holds
    keys: list[Tensor] = field(default_factory=list)  # (K, N, D) a layer
    values: list[Tensor] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)  # (K, N) a layer: blocks' rows that later hosts see


class _Dense:
    """The attention of the whole sequence in one layer after another."""

    def __init__(
        self, prompt: Prompt, sizes: Sizes, select: Select, rotate: Rotate, mixers: tuple[LayerKind, ...]
    ) -> None:
        self.sizes, self.select, self.rotate, self.mixers = sizes, select, rotate, mixers
        self.needs_projections = callable(select)
        ids: list[int] = []
        positions: list[int] = []
        kind: list[int] = []
        number: list[int] = []
        context, question = prompt.context_ids, prompt.question
        asked = question.ids if question and sizes.question and not prompt.copied else ()

        def put(tokens: tuple[int, ...], start: int, what: int, rank: int) -> None:
            ids.extend(tokens)
            positions.extend(range(start, start + len(tokens)))
            kind.extend([what] * len(tokens))
            number.extend([rank] * len(tokens))

        for rank, (start, stop) in enumerate(sizes.spans):
            context_part = sizes.beside[rank] - sizes.skip - len(asked)
            anchor = context[: sizes.skip] + asked + context[sizes.skip : sizes.skip + context_part]
            if sizes.beside[rank]:
                assert len(anchor) == sizes.beside[rank]
                put(anchor, 0, ANCHOR, rank)
            put(context[start:stop], start, BLOCK, rank)
        assert question is not None, "the twin compares the last question token's logits"
        put(question.query_ids, len(context), QUERY, len(sizes.spans))
        # The anchor's question stands at s.., the real one after the document and the separator.
        self.delta = len(context) + len(question.before) - sizes.skip
        self.ids, self.positions = torch.tensor(ids), torch.tensor(positions)
        self.kind, self.number = torch.tensor(kind), torch.tensor(number)
        self.static_NN = self._static()
        held = [torch.cat([self._rows(BLOCK, number) for number in numbers]) for numbers in sizes.held]
        self.out = Twin(torch.empty(0), sizes, held)

    def _rows(self, kind: int, number: int) -> Tensor:
        return ((self.kind == kind) & (self.number == number)).nonzero()[:, 0]

    def _static(self) -> Tensor:
        """Who sees whom, all but the passing rows: query i sees key j where [i, j] is set."""
        n = len(self.ids)
        order = torch.arange(n)
        q_kind, k_kind = self.kind[:, None], self.kind[None, :]
        same_block = self.number[:, None] == self.number[None, :]
        causal = order[:, None] >= order[None, :]
        has_anchor = (self.number > 0)[:, None]  # block 0's head is not seen by its block
        return (
            ((q_kind == k_kind) & same_block & causal)  # anchors, blocks and the question in themselves
            | ((q_kind == BLOCK) & (k_kind == ANCHOR) & same_block & has_anchor)
            | ((q_kind == QUERY) & (k_kind == BLOCK))
        )

    def _in_window(self, window: Window) -> Tensor:
        """Who sees whom in a window layer: context and question in true order, each anchor alone."""
        anchors = (self.kind == ANCHOR)[:, None] & (self.kind == ANCHOR)[None] & (self.number[:, None] == self.number)
        rest = (self.kind != ANCHOR)[:, None] & (self.kind != ANCHOR)[None]
        at, size = self.positions, window.window
        near = at[None] >= (at // size * size if window.chunked else at - size + 1)[:, None]
        return (anchors | rest) & near & (at[None] <= at[:, None])

    def _mixed(self, call: ConvCall | ScanCall) -> Tensor:
        """Run a linear layer: the context in true order with the question behind it, and each anchor by itself."""
        in_order = ((self.kind != ANCHOR) * (self.number + 1)).argsort(stable=True)
        rows = [in_order[int((self.kind == ANCHOR).sum()) :]]
        rows += [self._rows(ANCHOR, number) for number in range(len(self.sizes.spans))]
        out = call.blank()
        for each in (each for each in rows if len(each)):
            if isinstance(call, ConvCall):
                out[:, :, each] = call.convolve(call.x_BCS[:, :, each])
            else:
                given = {name: x[:, each] for name, x in vars(call.scan).items() if "_BS" in name}
                out[:, each] = replace(call.scan, **given).run(None)[0]
        return out

    def __call__(self, call: Call) -> Tensor:
        if isinstance(call, ConvCall | ScanCall):
            return self._mixed(call)
        assert isinstance(call, AttentionCall)
        layer, projections, scale = call.layer, call.projections, call.scale
        q_BHSD, k_BKSD, v_BKSD = call.q_BHSD, call.k_BKSD, call.v_BKSE
        layer_kind = self.mixers[layer]
        soft_cap = layer_kind.soft_cap if isinstance(layer_kind, Softmax) else None
        q_HND, k_KND, v_KND = q_BHSD[0], k_BKSD[0], v_BKSD[0]
        heads, n, _ = q_HND.shape
        group = heads // k_KND.shape[0]
        window = layer_kind if isinstance(layer_kind, Window) else None
        if window is None:
            selected_KN = self._selected(layer, q_HND, k_KND, v_KND, scale, projections)
        else:
            selected_KN = torch.zeros(k_KND.shape[:2], dtype=torch.bool)
        self.out.keys.append(k_KND)
        self.out.values.append(v_KND)
        self.out.selected.append(selected_KN)
        later_NN = (self.kind == BLOCK)[:, None] & (self.number[:, None] > self.number[None, :])
        for number in self.sizes.blind:
            later_NN[self._rows(BLOCK, number)] = False
        out_HND = torch.empty(heads, n, v_KND.shape[-1], dtype=q_HND.dtype)
        for j in range(k_KND.shape[0]):
            mask_NN = self.static_NN | (later_NN & selected_KN[j]) if window is None else self._in_window(window)
            for h in range(j * group, (j + 1) * group):
                scores_NN = q_HND[h] @ k_KND[j].T * scale
                if soft_cap is not None:
                    scores_NN = (scores_NN / soft_cap).tanh() * soft_cap
                scores_NN = scores_NN.masked_fill_(~mask_NN, -torch.inf)
                if call.sinks_H is not None:  # a key without a value, in every row
                    sink_N1 = call.sinks_H[h].to(scores_NN.dtype).expand(n, 1)
                    scores_NN = torch.cat([scores_NN, sink_N1], dim=1)
                out_HND[h] = scores_NN.softmax(-1)[:, :n] @ v_KND[j]
        return out_HND.transpose(0, 1)[None]

    def _selected(
        self,
        layer: int,
        q_HND: Tensor,
        k_KND: Tensor,
        v_KND: Tensor,
        scale: float,
        projections: Projections | None,
    ) -> Tensor:
        chosen_KN = torch.zeros(k_KND.shape[:2], dtype=torch.bool)
        for number, rows in enumerate(self.sizes.rows):
            if not rows:
                continue
            block = self._rows(BLOCK, number)
            if callable(self.select):
                assert projections is not None
                raw = (projections.q_BSP[0, block], projections.k_BSP[0, block], projections.v_BSP[0, block])
                start, end = self.sizes.spans[number][0], self.sizes.spans[-1][1]
                asked = self._question(layer, number, q_HND) if self.select.needs_question else q_HND[:, :0]
                parts = (q_HND[:, block], k_KND[:, block], v_KND[:, block], raw, asked)
                scores_KL = self.select(Seen(layer, number, *parts, scale, start, end))
            else:
                scores_KL = self._scores(layer, number, q_HND, k_KND[:, block], scale)
            if number == 0:
                scores_KL[:, : self.sizes.anchor] = -torch.inf
            best = (-scores_KL).argsort(dim=-1, stable=True)  # ties to the earlier token
            for j in range(k_KND.shape[0]):
                chosen_KN[j, block[best[j, :rows]]] = True
        return chosen_KN

    def _scores(self, layer: int, number: int, q_HND: Tensor, k_KLD: Tensor, scale: float) -> Tensor:
        if self.select == "recent":
            return torch.arange(k_KLD.shape[1]).repeat(k_KLD.shape[0], 1).float()
        if self.select == "norm":
            return -k_KLD.pow(2).sum(-1).sqrt()
        if self.select == "random":
            seen = Candidates(
                layer, number, q_HND[None], k_KLD[None], k_KLD[None], scale, None, None, 0, 0, lambda x, delta: x
            )
            return Random().score(seen)[0]
        assert self.select == "query"
        q_HQD = self._question(layer, number, q_HND)
        group = q_HND.shape[0] // k_KLD.shape[0]
        means = []
        for j in range(k_KLD.shape[0]):
            weights = [(q_HQD[h] @ k_KLD[j].T * scale).softmax(-1) for h in range(j * group, (j + 1) * group)]
            means.append(torch.stack(weights).mean(dim=(0, 1)))
        mean_KL = torch.stack(means)
        padded = torch.nn.functional.pad(mean_KL, (2, 2), value=-torch.inf)
        return padded.unfold(-1, 5, 1).amax(-1)  # max-pool over 5 neighbours

    def _question(self, layer: int, number: int, q_HND: Tensor) -> Tensor:
        s, l_q = self.sizes.skip, self.sizes.question
        beside = self._rows(ANCHOR, number)
        return self.rotate(q_HND[:, beside[s : s + l_q]], self.delta, layer)


def twin(
    adapter: Adapter,
    rotate: Rotate,
    prompt: Prompt,
    strategy: str | Sizes,
    hosts: int,
    *,
    select: Select = None,
    anchor_len: int | None = None,
    passing_len: int | None = None,
    published: bool = False,
) -> Twin:
    """Prefill and ask in one forward pass; ``rotate(q, delta, layer)`` turns rotated queries on.

    ``strategy``: one that is known by name, or the lengths of another.
    """
    chosen = select if strategy in ("apb", "spava") or isinstance(strategy, Sizes) else None
    lengths = {"anchor_len": anchor_len, "passing_len": passing_len}
    found = strategy
    if not isinstance(found, Sizes):
        found = sizes(found, prompt, hosts, select=chosen, published=published, **lengths)
    dense = _Dense(prompt, found, chosen, rotate, adapter.shape.mixers)
    with torch.inference_mode():
        dense.out.logits = adapter.logits(dense.ids, dense.positions, dense)
    return dense.out
