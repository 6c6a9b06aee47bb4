"""Models with linear layers over hosts, beside what the matrix of families does: tiny chunks, strategies, graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from apb.attention.exact import ExactAttention
from apb.decode import decoder
from apb.models.adapter import Adapter
from apb.plan.bytes import bytes_by_kind
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import PromptLengths
from apb.prompt.prompt import Prompt, Question
from apb.strategies import strategy
from burst.errors import UserError
from burst.kernels import kernel
from burst.transport import Transport, VirtualWorld
from tests.support.families import FAMILIES, VOCAB, adapt_family
from tests.support.matrix import LIMIT, adapter, wanted
from tests.support.planned import planned_sizes
from tests.support.tape import Tape
from tests.support.tiny import TinyEngine, random_ids, tiny_engine
from tests.support.twin import twin


def prompt(context: int, asked: int = 9) -> Prompt:
    """Return a random prompt whose question is ``asked`` tokens long; 0: none."""
    ids = random_ids(context + asked, 7, vocab=VOCAB)
    question = Question(ids[context : context + 1], ids[context + 1 : -2], ids[-2:], None)
    return Prompt(ids[:context], 3, question if asked else None)


def engine(
    family: str,
    hosts: int,
    name: str = "ring",
    chunk: int | None = None,
    model: Adapter | None = None,
    **options: Any,
) -> TinyEngine:
    made = strategy(name, **options)
    e = tiny_engine(model or adapter(family, False), made, hosts, "norm" if name in ("apb", "spava") else None)
    e.setup = dataclasses.replace(e.setup, chunk_tokens=chunk)
    return e


@pytest.mark.parametrize("family", ("qwen3_5", "nemotron_h", "falcon_h1"))
@pytest.mark.parametrize("chunk", (1, 3))
def test_single_tokens_and_few_are_chunks(family: str, chunk: int) -> None:
    asked = prompt(23)
    for hosts in (1, 3):
        e = engine(family, hosts, "ring" if hosts > 1 else "full", chunk)
        error = float((e.prefill(asked).logits() - wanted(family, asked)).abs().max())
        assert error < LIMIT


@pytest.mark.parametrize("family", ("qwen3_5", "nemotron_h"))
@pytest.mark.parametrize("name, options", [("star", {}), ("apb", {"anchor": "shared"}), ("apb", {}), ("spava", {})])
def test_approximate_strategies_are_exact_in_linear_layers(family: str, name: str, options: dict[str, Any]) -> None:
    """Beside a dense twin that runs the context in true order there, and each anchor as a sequence of its own."""
    asked, doubles = prompt(120), adapt_family(family, torch.float64)
    for chunk in (None, 16):
        e = engine(family, 3, name, chunk, doubles, **options)
        handle = e.prefill(asked)
        plan = e.setup.plan(asked)
        assert handle.metrics["bytes_by_kind"] == bytes_by_kind(plan, asked.lengths.query)
        held = planned_sizes(plan, asked, False)
        want = twin(doubles, lambda q, delta, layer: q, asked, held, 3, select=None if name == "star" else "norm")
        assert (handle.logits() - want.logits).abs().max() < 1e-5  # norms compute in fp32


@pytest.mark.parametrize("family", ("qwen3_5", "falcon_h1"))
def test_steps_run_as_graphs(family: str) -> None:
    e, asked = engine(family, 2), prompt(40)
    handle = e.prefill(asked)
    made = decoder("lookup", tokens=6)
    want = [e.generate(handle.fork(), 8, each).token_ids for each in (decoder("autoregressive"), made)]
    tapes = [Tape() for _ in range(2)]
    for rank, tape in enumerate(tapes):
        e.cluster.host(rank).capture = tape  # type: ignore[attr-defined]
    got = [e.generate(handle.fork(), 8, each).token_ids for each in (decoder("autoregressive"), made)]
    assert got == want and min(tape.replays for tape in tapes) > 8


@pytest.mark.parametrize("family", [name for name, found in FAMILIES.items() if "linear" in found.kinds])
def test_hidden_states_of_any_hosts_are_those_of_one(family: str) -> None:
    """In fp64 by our own scan, of all tokens, before the last layer: to roundings of fp64."""
    model, ids = adapt_family(family, torch.float64), torch.tensor(random_ids(61, 3, vocab=VOCAB))
    last = model.shape.layers - 1
    parts = {}
    for hosts, layout in ((1, "zigzag"), (3, "zigzag"), (5, "contiguous"), (8, "zigzag")):
        plan = strategy("ring", layout=layout).plan(PromptLengths(61, 1, 0, 0), hosts, model.shape)
        world = VirtualWorld(hosts)

        def host(t: Transport, plan: PrefillPlan = plan) -> torch.Tensor:
            at = torch.cat([torch.arange(start, stop) for start, stop in plan.host_plans[t.rank].spans])
            attention = ExactAttention(plan, t, kernel("reference"), lambda layer: None)
            with torch.inference_mode(), model.capturing((last,)) as features:
                model.run(ids[at], at, attention)
            return torch.cat([at[:, None].double(), features.value_SF], dim=1)

        rows = torch.cat(world.run(host))
        parts[hosts, layout] = rows[rows[:, 0].argsort(), 1:]
    one = parts.pop((1, "zigzag"))
    # Norms and gates compute in fp32. Where one of these numbers lies between two, fp64's rounding decides which it is.
    limit = 1e-5 if family == "kimi_linear" else 1e-12
    assert all((other - one).abs().max() < limit for other in parts.values())


def shifted(original: Any) -> Any:
    """A convolution that sees a token further back than its kernel."""
    return lambda x, *args, **options: original(x, *args, **options) + torch.nn.functional.pad(x, (4, 0))[:, :, :-4]


def unnormalised(original: Any) -> Any:
    """A recurrence that does without the normalisation that it is asked for."""
    return lambda *args, **options: original(*args, **(options | {"use_qk_l2norm_in_kernel": False}))


def forgetful(original: Any) -> Any:
    """A recurrence that does not go on from the state that it is given."""
    return lambda *args, **options: original(*args, **(options | {"initial_state": None}))


@pytest.mark.parametrize(
    "name, broken, words",
    [
        ("causal_conv1d_fn", shifted, "sees more than 3 tokens before"),
        ("torch_chunk_gated_delta_rule", unnormalised, "not that of the kind 'delta'"),
        ("torch_chunk_gated_delta_rule", forgetful, "does not go on from a state"),
    ],
)
def test_functions_that_compute_something_else_are_rejected(
    name: str, broken: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version of a kernel package might."""
    known = getattr(modeling_qwen3_5, name)
    monkeypatch.setattr(modeling_qwen3_5, name, broken(getattr(known, "apb_original", known)))
    with pytest.raises(UserError, match=words):
        adapt_family("qwen3_5")
