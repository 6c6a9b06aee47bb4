"""Labels from a frozen model and a prompt with a known answer: projections, and the importance of each token.

Shapes: B batch (1), S tokens run, H query heads, K kv heads, G = H / K, T document tokens, R query and answer tokens,
D head dim, E width of the concatenated q, k and v projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.heads import head_input
from apb.layers.call import AttentionCall, Call, plain
from apb.models.adapter import Adapter
from apb.train.prompts import LabelPrompt
from burst.kernels import Kernel
from burst.kernels.merge import Accumulator

# layer, inputs (T, E) in the model's type, importance (K, T) fp32
OnLayer = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class PromptLayout:
    """One prompt as a sequence: template head, then with ``embedded`` a copy of the question as in APB's anchors, the
    document, and the rows (question and answer) that importance is taken from."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    head: int
    document: int  # first document token
    rows: int  # first token of the query phase
    end: int  # those rows' first position

    @classmethod
    def of(cls, sample: LabelPrompt, *, embedded: bool) -> PromptLayout:
        """Lay a prompt out; the copy stands at the positions after the head, everything else at its true ones."""
        prompt = sample.prompt
        assert prompt.question is not None
        s, copy = prompt.head, prompt.question.ids if embedded else ()
        tail = (*prompt.question.query_ids, *sample.answer_ids)
        start, stop = s + sample.before, len(prompt.context_ids) + sample.before
        end = stop + sample.behind
        return cls(
            ids=(*prompt.context_ids[:s], *copy, *prompt.context_ids[s:], *tail),
            positions=(*range(s + len(copy)), *range(start, stop), *range(end, end + len(tail))),
            head=s,
            document=s + len(copy),
            rows=len(prompt.context_ids) + len(copy),
            end=end,
        )


class Observer:
    """Stands in for a model's attention: exact attention over a layout, and every layer's labels.

    Importance of a document token for a kv head is the largest attention logit that it gets from any row of question
    and answer and any query head of the group; the document sees the copy of the question, question and answer do not.
    Source: Locret (arXiv 2410.01805), section 3.2; the question's rows are ours.
    """

    needs_projections = True

    def __init__(self, layout: PromptLayout, adapter: Adapter, kernel: Kernel, on_layer: OnLayer) -> None:
        self._layout, self._rotate, self._kernel, self._on_layer = layout, adapter.rotate, kernel, on_layer

    def __call__(self, call: Call) -> Tensor:
        """Hand the layer's inputs and labels over and return the attention output (B, S, H, D)."""
        at, (q_BHSD, k_BKSD, v_BKSD, scale) = self._layout, plain(call)
        assert isinstance(call, AttentionCall) and call.projections is not None
        document = slice(at.document, at.rows)
        q_BHRD, k_BKTD = q_BHSD[:, :, at.rows :], k_BKSD[:, :, document]
        seen = call.projections.rows(at.document, at.rows)
        x_BTE = head_input(seen, self._rotate(k_BKTD, -at.end, call.layer))
        self._on_layer(call.layer, x_BTE[0], importance(q_BHRD, k_BKTD, scale)[0])
        first, _ = self._kernel(
            q_BHSD[:, :, : at.rows], k_BKSD[:, :, : at.rows], v_BKSD[:, :, : at.rows], causal=True, scale=scale
        )
        rows = Accumulator()
        k_context, v_context = (
            torch.cat([x[:, :, : at.head], x[:, :, document]], dim=2) if at.head < at.document else x[:, :, : at.rows]
            for x in (k_BKSD, v_BKSD)
        )
        rows.add(*self._kernel(q_BHRD, k_context, v_context, causal=False, scale=scale))
        rows.add(*self._kernel(q_BHRD, k_BKSD[:, :, at.rows :], v_BKSD[:, :, at.rows :], causal=True, scale=scale))
        out_BHSD = torch.cat([first, rows.finish(q_BHSD.dtype)[0]], dim=2)
        return out_BHSD.transpose(1, 2)


def importance(q_BHRD: Tensor, k_BKTD: Tensor, scale: float) -> Tensor:
    """Return (B, K, T), fp32: the largest logit of any row and any query head of the group."""
    n_kv = k_BKTD.shape[1]
    group = q_BHRD.shape[1] // n_kv
    per_head = []
    for j in range(n_kv):
        logits_BGRT = q_BHRD[:, j * group : (j + 1) * group] @ k_BKTD[:, j : j + 1].transpose(-1, -2)
        per_head.append(logits_BGRT.float().amax(dim=(1, 2)) * scale)
    return torch.stack(per_head, dim=1)


def observe(adapter: Adapter, kernel: Kernel, sample: LabelPrompt, *, embedded: bool, on_layer: OnLayer) -> None:
    """Run one prompt with its answer through the frozen model; ``on_layer`` gets every layer's inputs and labels."""
    layout = PromptLayout.of(sample, embedded=embedded)
    device = adapter.device
    ids_S = torch.tensor(layout.ids, device=device)
    positions_S = torch.tensor(layout.positions, device=device)
    with torch.inference_mode():
        adapter.run(ids_S, positions_S, Observer(layout, adapter, kernel, on_layer))
