"""Requests to hosts, cut out of a prompt and its plan."""

from __future__ import annotations

import dataclasses

import torch

from apb.compress import Compressor
from apb.decode.base import DecodeRequest
from apb.engine.handle import KVHandle
from apb.host.messages import PrefillRequest
from apb.plan.plan import PrefillPlan
from apb.prompt.prompt import Prompt


def prefill_request(
    handle_id: str, prompt: Prompt, plan: PrefillPlan, compressor: Compressor | None, rank: int
) -> PrefillRequest:
    """Return what one host needs of the prompt."""
    host, context, question = plan.host_plans[rank], prompt.context_ids, prompt.question
    # With a copy of the question in the context, the anchor is the context's own beginning.
    asked = question.ids if question and plan.question_len and not prompt.copied else ()
    s = plan.anchor_skip
    anchor = context[:s] + asked + context[s : max(s, plan.anchor_len - len(asked))]
    delta = len(context) + len(question.before) - plan.anchor_skip if question else 0
    drafts = plan.draft.spans(host.spans, len(context)) if plan.draft is not None else ()
    return PrefillRequest(
        handle=handle_id,
        plan=plan,
        compressor=compressor,
        anchor_ids=anchor[host.anchor_start : host.anchor_start + host.anchor_len],
        block_ids=tuple(token for start, stop in host.spans for token in context[start:stop]),
        question_delta=delta,
        query_ids=question.query_ids if question else (),
        next_ids=tuple(token for start, stop in drafts for token in context[start + 1 : stop + 1]),
    )


def decode_requests(handle: KVHandle, request: DecodeRequest, hosts: int) -> list[tuple[str, DecodeRequest]]:
    """Return each host's request: all tokens so far go to the one that decides, where decoder or rules read them."""
    requests = [(handle.id, request)] * hosts
    if request.decoder.needs_history or request.rules:
        history = torch.tensor(handle.token_ids)
        requests[handle.owner] = (handle.id, dataclasses.replace(request, history=history))
    return requests
