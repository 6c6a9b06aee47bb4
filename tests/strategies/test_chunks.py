"""Blocks in chunks: the same logits, KV, tokens and bytes as whole ones, at any length and for every strategy."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.compress import Compressor, compressor
from apb.compress.base import Candidates
from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import PROCESS_BYTES, Setup, fitting_chunk, needed_bytes
from apb.layers.call import AttentionCall, Call, plain
from apb.layers.full import Full
from apb.models.chunked import InChunks, chunkable
from apb.models.hooks import placed
from apb.plan.memory import NOTHING, host_memory
from apb.plan.plan import PrefillPlan
from apb.plan.shapes import PromptLengths
from apb.strategies import STRATEGIES, Strategy, strategy
from burst.errors import UserError
from tests.compress.test_compressors import NAMES, pair
from tests.models.test_adapter import CONFIGS, prompt_for
from tests.plan.test_plans import SHAPE
from tests.support import tiny
from tests.support.tiny import adapt, make_prompt, tiny_engine, tiny_llama

CHUNKS = (1, 7, 64, 5000)
FORMS = (*STRATEGIES, "apb shared")
PASSING = ("apb", "apb shared", "spava")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def form(name: str, **options: Any) -> Strategy:
    """Return a strategy by its name, and the form of its anchor where that is not the default."""
    name, *anchor = name.split()
    return strategy(name, **options, **({"anchor": anchor[0]} if anchor else {}))


@functools.cache
def engine(name: str, hosts: int, select: str | None, dtype: torch.dtype, chunk: int | None) -> Engine:
    made = tiny_engine(tiny_llama(dtype), form(name), hosts, select)
    made.setup = dataclasses.replace(made.setup, chunk_tokens=chunk)
    return made


def prefilled(made: Engine, lengths: tuple[int, int, int]) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Return the handle, its logits and all hosts' KV, layer by layer."""
    handle = made.prefill(make_prompt(*lengths))
    hosts = [tiny.shards(made.cluster.host(r)._caches[handle.id]) for r in range(made.cluster.hosts)]
    return handle, made.logits(handle), [torch.stack([kv.k_BKTD, kv.v_BKTE]) for host in hosts for kv in host]


def check(
    name: str,
    hosts: int,
    select: str | None = None,
    lengths: tuple[int, int, int] = (253, 5, 6),
    dtype: torch.dtype = torch.float64,
    chunks: tuple[int, ...] = CHUNKS,
) -> None:
    whole = engine(name, hosts, select, dtype, None)
    handle, logits, kept = prefilled(whole, lengths)
    scale = logits.abs().max()
    tokens = whole.generate(handle, max_new_tokens=4).token_ids
    for chunk in chunks:
        made = engine(name, hosts, select, dtype, chunk)
        other, got, theirs = prefilled(made, lengths)
        assert (got - logits).abs().max() <= TOLERANCE[dtype] * scale, chunk
        for mine, their in zip(kept, theirs, strict=True):
            assert (mine - their).abs().max() <= TOLERANCE[dtype] * mine.abs().max(), chunk
        assert other.metrics["bytes_by_kind"] == handle.metrics["bytes_by_kind"]
        assert made.generate(other, max_new_tokens=4).token_ids == tokens, chunk


CASES = [(s, h, d) for s in FORMS for h in (1, 2, 4) for d in TOLERANCE if d == torch.float64 or h == 2]


@pytest.mark.parametrize("name, hosts, dtype", [case for case in CASES if case[0] != "full" or case[1] == 1])
def test_every_strategy_is_the_same_in_chunks(name: str, hosts: int, dtype: torch.dtype) -> None:
    check(name, hosts, "query" if form(name).takes_compressor else None, dtype=dtype)


@pytest.mark.parametrize("lengths, hosts", [((1, 0, 1), 1), ((3, 1, 1), 3), ((9, 5, 6), 8), ((30, 2, 40), 3)])
@pytest.mark.parametrize("name", [*PASSING, "star", "ring"])
def test_short_contexts_are_the_same_in_chunks(name: str, lengths: tuple[int, int, int], hosts: int) -> None:
    check(name, hosts, "query" if name in PASSING else None, lengths, chunks=(1, 2, 7))


@settings(max_examples=50, deadline=None)
@given(
    context=st.integers(1, 150),
    hosts=st.integers(1, 5),
    chunk=st.integers(1, 160),
    name=st.sampled_from([*PASSING, "star", "usp"]),
    route=st.sampled_from(["ring", "allgather"]),
    scorer=st.sampled_from(["query", "snapkv", "expected"]),
)
def test_any_length_is_the_same_in_chunks(
    context: int, hosts: int, chunk: int, name: str, route: str, scorer: str
) -> None:
    hosts, options = min(hosts, context), {"passing": route} if name.startswith("apb") else {}
    found = []
    for size in (None, chunk):
        select = scorer if name in PASSING else None
        made = tiny_engine(tiny_llama(torch.float64), form(name, **options), hosts, select)
        made.setup = dataclasses.replace(made.setup, chunk_tokens=size)
        found.append(made.logits(made.prefill(make_prompt(context, min(3, context)))))
    assert (found[0] - found[1]).abs().max() <= 1e-12 * found[0].abs().max()


@pytest.mark.parametrize("passing", PASSING)
@pytest.mark.parametrize("name", NAMES)
def test_every_compressor_chooses_the_same_in_chunks(name: str, passing: str, tmp_path: Path) -> None:
    adapter = tiny_llama(torch.float64)
    scorer, _ = pair(name, tmp_path, tiny.rotation(adapter))
    found = []
    for chunk in (None, 13):
        made = tiny_engine(adapter, form(passing), 3, scorer)
        made.setup = dataclasses.replace(made.setup, chunk_tokens=chunk)
        found.append(prefilled(made, (253, 5, 6))[1])
    assert (found[0] - found[1]).abs().max() <= 1e-12 * found[0].abs().max()


@dataclass(frozen=True)
class Loudest(Compressor):
    """Keeps the tokens with the largest queries, whatever the question is, though it asks for it."""

    name: ClassVar[str] = "loudest"
    needs_question: ClassVar[bool] = True

    def score(self, block: Candidates) -> torch.Tensor:
        norms_BHS = torch.linalg.vector_norm(block.q_BHSD, dim=-1)
        return norms_BHS.unflatten(1, (block.k_BKSD.shape[1], -1)).sum(dim=2).float()


@pytest.mark.parametrize("passing", PASSING)
def test_outputs_do_not_take_the_place_of_queries_before_selection(passing: str) -> None:
    found = []
    for chunk in (None, 13):
        made = tiny_engine(tiny_llama(torch.float64), form(passing), 3, Loudest())
        made.setup = dataclasses.replace(made.setup, chunk_tokens=chunk)
        found.append(prefilled(made, (253, 5, 6))[1])
    assert (found[0] - found[1]).abs().max() <= 1e-12 * found[0].abs().max()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_architecture_is_the_same_in_chunks(config: str) -> None:
    # Experts know no fp64, and some other models compute norms and angles in fp32 whatever their own type is.
    dtype = torch.float32 if config in ("qwen3-moe", "mixtral") else torch.float64
    adapter, prompt = adapt(CONFIGS[config](), dtype), prompt_for()
    for name, hosts in (("full", 1), ("apb", 3), ("spava", 2)):
        found = []
        for chunk in (None, 16):
            made = tiny_engine(adapter, form(name), hosts, "norm" if name in PASSING else None)
            made.setup = dataclasses.replace(made.setup, chunk_tokens=chunk)
            found.append(made.logits(made.prefill(prompt)))
        assert (found[0] - found[1]).abs().max() <= 5e-6 * found[0].abs().max()


@pytest.mark.parametrize(
    "name, hosts", [("full", 1), ("apb", 3), ("apb shared", 3), ("spava", 2), ("star", 2), ("ring", 2)]
)
def test_no_more_than_a_chunk_runs_at_once(name: str, hosts: int) -> None:
    adapter = tiny.adapt(tiny.llama_config())
    base = adapter._base
    tokens: dict[str, list[int]] = {}

    def watch(what: str) -> Any:
        return lambda module, given, output: tokens.setdefault(what, []).append(output.shape[1])

    for i, layer in enumerate(base.layers):
        for part in ("input_layernorm", "mlp"):
            getattr(layer, part).register_forward_hook(watch(f"{part} {i}"))
        layer.self_attn.q_proj.register_forward_hook(watch(f"q {i}"))
    base.norm.register_forward_hook(watch("norm"))
    made = tiny_engine(adapter, form(name), hosts, "norm" if name in PASSING else None)
    made.setup = dataclasses.replace(made.setup, chunk_tokens=16)
    prompt = make_prompt(199, question=0)
    tokens.clear()
    made.prefill(prompt)
    assert max(max(counts) for counts in tokens.values()) == 16
    hosts_run = [(host.tokens_run, host.alone) for host in made.setup.plan(prompt).host_plans]
    run, alone = sum(count for count, _ in hosts_run), sum(count for count, is_alone in hosts_run if is_alone)
    assert alone == {"full": 199, "star": 100}.get(name, 0)
    assert sum(tokens["mlp 0"]) == sum(tokens["mlp 1"]) == run
    # Nobody reads what follows the last layer's attention; only chunks that run through all layers in turn go there.
    assert sum(tokens.get("mlp 2", [])) == sum(tokens.get("norm", [])) == alone


def test_progress_of_chunks_goes_up_to_all_layers() -> None:
    seen: list[tuple[int, int]] = []
    for name in ("full", "ring"):
        seen.clear()
        engine(name, 1, None, torch.float64, 7).prefill(make_prompt(100), on_layer=lambda *at: seen.append(at))
        assert len(seen) >= 3 and seen == sorted(seen) and seen[-1] == (3, 3)


class Given:
    """Attention that lets every token see itself."""

    needs_projections = False

    def __call__(self, call: Call) -> torch.Tensor:
        return plain(call)[2].transpose(1, 2)


class Layer(torch.nn.Module):
    """A decoder layer that is given something, or returns something, that nobody knows how to cut."""

    def __init__(self, returns: Any) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, hidden: torch.Tensor, apb_attention: Any = None, per_token: Any = None) -> Any:
        q = hidden[..., None, :].transpose(1, 2)
        apb_attention(AttentionCall(0, q, q, q, 1.0))
        return self.returns


@pytest.mark.parametrize(
    "given, words",
    [
        ({"per_token": torch.zeros(1, 5)}, r"per_token \(1, 5\)"),
        ({}, "returns list"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(given: dict[str, torch.Tensor], words: str) -> None:
    layer = Layer([])
    chunkable(layer, (0,))
    chunks = InChunks(Given(), [Full(1, 1, 4, 4)] * 2, 3, to_the_end=True)
    with pytest.raises(UserError, match=words) as refused, placed(torch.arange(5)):
        layer(torch.zeros(1, 5, 4), apb_attention=chunks, **given)
    assert "chunk_tokens=null" in refused.value.remedy


# -- memory ---------------------------------------------------------------------------------------------


def plan_of(name: str, context: int, hosts: int, chunk: int | None) -> PrefillPlan:
    scorer = compressor("norm") if name in PASSING else None
    plan = form(name).plan(PromptLengths(context, 5, 6, 11), hosts, SHAPE, scorer)
    return dataclasses.replace(plan, chunk_tokens=chunk)


def test_memory_of_a_block_alone_does_not_depend_on_its_length() -> None:
    short, long = (host_memory(plan_of("full", n, 1, 64), 0)["activations"] for n in (1000, 90_000))
    assert short == long == host_memory(plan_of("full", 64, 1, None), 0)["activations"]
    assert host_memory(plan_of("full", 1000, 1, 5000), 0) == host_memory(plan_of("full", 1000, 1, None), 0)


def test_memory_of_other_blocks_grows_by_what_stays() -> None:
    hidden = q = 4 * 64  # bytes a token: the residual stream, queries
    rotation, kv = 4 * 2 * 16, 4 * 2 * 32
    for name, more in (
        *((name, 0) for name in ("star", *PASSING)),
        ("ring", 2 * q + kv),
    ):  # with what is packed to be sent
        short, long = (plan_of(name, n, 2, 64) for n in (1000, 1400))
        ran = long.host_plans[1].tokens_run - short.host_plans[1].tokens_run
        beside = [host_memory(p, 1)["activations"] for p in (short, long)]
        rows = [(p.passing_rows(1) + p.anchor_len) * kv * 2 for p in (short, long)]
        if name == "ring":
            assert short.spread is not None and long.spread is not None
            rows = [p.spread.workspace(1, SHAPE.heads.attention_shape(4)) for p in (short, long) if p.spread]
        assert beside[1] - beside[0] - (rows[1] - rows[0]) == ran * (hidden + q + rotation + kv + more)


def test_hosts_must_agree_on_chunks() -> None:
    assert len({plan_of("star", 100, 2, chunk).digest for chunk in (None, 7, 8)}) == 3


def test_a_prefill_that_is_too_large_is_told_its_chunk() -> None:
    setup = engine("star", 2, None, torch.float32, None).setup
    plan = plan_of("star", 4000, 2, None)
    need = {
        chunk: needed_bytes(dataclasses.replace(plan, chunk_tokens=chunk), NOTHING, sharing=2, copies=1)
        for chunk in (None, 512, 256, 32)
    }
    assert need[32] < need[256] < need[512] < need[None]
    for room, fits in ((need[512], 512), (need[512] - 1, 256), (need[32], 32), (need[32] - 1, None)):
        assert fitting_chunk(plan, NOTHING, room, sharing=2, copies=1) == fits
        with pytest.raises(UserError, match="does not fit") as refused:
            setup.check_memory(plan, NOTHING, room, sharing=2, copies=1)
        assert (f"chunk_tokens={fits} makes it fit" in refused.value.remedy) == (fits is not None)
    with pytest.raises(UserError) as refused:  # shorter than the block already, and not short enough
        setup.check_memory(dataclasses.replace(plan, chunk_tokens=512), NOTHING, need[256], sharing=2, copies=1)
    assert "chunk_tokens=256 makes it fit" in refused.value.remedy


def test_the_heaviest_host_of_a_prefill_in_chunks_is_charged() -> None:
    setup = engine("spava", 2, "query", torch.float32, None).setup
    plan = dataclasses.replace(plan_of("spava", 4000, 2, 256), lengths=PromptLengths(4000, 5, 6, 0))
    held = [sum(host_memory(plan, r).values()) for r in range(2)]
    assert held[0] > held[1]
    need = held[0] + PROCESS_BYTES
    assert needed_bytes(plan, NOTHING, sharing=1, copies=1) == need
    setup.check_memory(plan, NOTHING, need, sharing=1, copies=1)
    with pytest.raises(UserError, match="does not fit"):
        setup.check_memory(plan, NOTHING, need - 1, sharing=1, copies=1)


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "auto"])
def test_chunks_out_of_range_are_refused(chunk: Any) -> None:
    with pytest.raises(UserError, match="chunk_tokens is out of range"):
        Setup.make(EngineOptions("nowhere", chunk_tokens=chunk))
