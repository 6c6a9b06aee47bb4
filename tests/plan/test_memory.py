"""What draft heads, their trees, gathering and a CPU's buffers add to the plan of memory."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from safetensors.torch import load_file

from apb.decode.base import DecodeRequest, Decoding
from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.decode.speculate import verify
from apb.decode.tree import root_only
from apb.draft import files
from apb.draft.spec import DraftSpec
from apb.engine.requests import prefill_request
from apb.plan.memory import NOTHING, Generation, host_memory
from apb.plan.plan import PrefillPlan
from apb.prompt.prompt import Prompt
from apb.strategies import strategy
from burst.transport import Transport
from tests.plan.test_memory_plan import Living
from tests.plan.test_plans import SHAPE
from tests.support.drafting import engine, prompt
from tests.support.tiny import TinyEngine, adapt, llama_config, make_prompt, tiny_engine

TREE = root_only(7).grafted(range(10, 14), 99).grafted(range(20, 30), 99).grafted(range(30, 35), 99)  # 20 rows


def lived(e: TinyEngine, plan: PrefillPlan, made: Prompt) -> list[int]:
    """Prefill and return the bytes that lived at once on every host, what it keeps among them."""
    requests = [prefill_request("a", made, plan, e.setup.compressor, rank) for rank in range(plan.hosts)]

    def run(t: Transport) -> int:
        with Living() as live:
            e.cluster.host(t.rank).prefill(requests[t.rank])
        return live.peak

    return e.cluster.world.run(run)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("name", ["ring", "allgather", "ulysses"])
def test_on_a_cpu_buffers_stay_from_layer_to_layer(name: str, chunk: int | None) -> None:
    config = llama_config(intermediate_size=384, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    e = tiny_engine(adapt(config), strategy(name), 4)
    e.setup = dataclasses.replace(e.setup, chunk_tokens=chunk)
    made = make_prompt(1500)
    plan = e.setup.plan(made)
    for rank, live in enumerate(lived(e, plan, made)):
        room = host_memory(plan, rank)["kv"] + host_memory(plan, rank)["activations"]
        assert 0.7 * room < live <= room


@pytest.mark.parametrize("window", [24, None])
def test_a_prefills_tensors_with_a_draft_head_take_what_the_plan_says(window: int | None) -> None:
    e = engine(2, window=window)
    made = prompt(380)
    plan = e.setup.plan(made)
    for rank, live in enumerate(lived(e, plan, made)):
        room = host_memory(plan, rank)["kv"] + host_memory(plan, rank)["activations"]
        buffers = 3 * 64 * plan.shape.widest_row if rank == 1 else 0  # the tail's, which starts with 64 rows
        assert 0.7 * room < live <= room + buffers


def test_a_trees_rows_are_in_the_plan() -> None:
    e = engine(2)
    plan, handle = e.setup.plan(prompt()), e.prefill(prompt())
    e.generate(handle, max_new_tokens=3)
    shape, tree = plan.shape, Generation(30, len(TREE))
    one, many = (host_memory(plan, 1, Generation(30, rows)) for rows in (1, len(TREE)))
    assert many["kv"] - one["kv"] == (len(TREE) - 1) * shape.kv_bytes
    assert host_memory(plan, 0, tree)["kv"] == host_memory(plan, 0)["kv"]  # they lie on the host that decides
    wide = dataclasses.replace(plan, shape=dataclasses.replace(shape, vocab=10**6))
    more = (
        host_memory(wide, 1, tree)["activations"] - host_memory(wide, 1, Generation(30, len(TREE) - 1))["activations"]
    )
    assert more > 10**6 * shape.element_size  # every row has its logits

    def run(t: Transport) -> int:
        host = e.cluster.host(t.rank)
        cache, request = host._caches[handle.id], DecodeRequest(Lookup())
        d = Decoding(host.adapter, host.kernel, t, cache, request, None, lambda token: None, time.perf_counter)
        with torch.inference_mode(), Living() as live:
            verify(d, TREE.tokens, TREE.parents, TREE if d.decides else None)
        return live.peak

    short = dataclasses.replace(plan, lengths=dataclasses.replace(plan.lengths, query=0), draft=None)
    decoding = [host_memory(dataclasses.replace(short, chunk_tokens=1), rank, tree)["activations"] for rank in (0, 1)]
    for planned, live in zip(decoding, e.cluster.world.run(run), strict=True):
        assert 0.5 * planned < live < 1.1 * planned


@pytest.mark.parametrize(("window", "adaptive"), [(24, 0), (None, 0), (24, 40)])
def test_a_draft_heads_weights_and_rows_are_in_the_plan(window: int | None, adaptive: int) -> None:
    e = engine(2, window=window, adaptive=adaptive)
    plan, handle = e.setup.plan(prompt()), e.prefill(prompt())
    e.generate(handle, max_new_tokens=20, decode=Eagle2(depth=3, width=4, tokens=12))
    assert plan.draft is not None
    bare, answer = dataclasses.replace(plan, draft=None), Generation(20, 12)
    draft = e.cluster.host(1)._caches[handle.id].draft
    rows = draft.rows() if draft is not None else None
    assert draft is not None and rows is not None
    drafted = adaptive * 64  # weights of the LM head's rows, copied
    weights = sum(p.numel() for p in draft.head.parameters()) + drafted
    for rank in (0, 1):
        assert host_memory(plan, rank, answer)["weights"] - host_memory(bare, rank, answer)["weights"] == 8 * weights
    kept = host_memory(plan, 1, answer)["kv"] - host_memory(bare, 1, answer)["kv"] - 8 * drafted
    own = rows.k_BKTD.nbytes + rows.v_BKTE.nbytes + (draft.bits.nbytes if draft.bits is not None else 0)
    assert own <= kept <= own + 2 * plan.draft.row_bytes  # of the last two tokens there may be none yet
    assert host_memory(plan, 0, answer)["kv"] == host_memory(bare, 0, answer)["kv"]


def test_the_shipped_heads_size_is_known_before_it_is_loaded() -> None:
    file = files.find("smollm2-135m")
    numbers = sum(tensor.numel() for tensor in load_file(file).values())
    assert files.footprint(file) == (numbers, 576)
    shape = dataclasses.replace(SHAPE, hidden=576, vocab=49152)
    quarter = 49152 // 4 * 576
    for spec, weights, adapted in (
        (DraftSpec("smollm2-135m"), numbers + quarter, quarter),
        (DraftSpec("smollm2-135m", adaptive=False), numbers + quarter, 0),
        (DraftSpec("smollm2-135m", vocab=None), numbers, 0),
    ):
        handoff = spec.handoff(shape, (2,))
        assert (handoff.weight_bytes, handoff.adapted_bytes, handoff.feature_size) == (4 * weights, 4 * adapted, 576)


@pytest.mark.parametrize("hosts", [1, 3])
def test_a_gathered_cache_stands_beside_what_it_was(hosts: int) -> None:
    e = engine(hosts, "full" if hosts == 1 else "apb")
    plan = e.setup.plan(prompt())
    sharded, gathered = (host_memory(plan, hosts - 1, Generation(5, gathered=g))["kv"] for g in (False, True))
    row = plan.shape.kv_bytes
    assert gathered - sharded == (0 if hosts == 1 else (149 + 11) * row)
    assert host_memory(plan, 0, NOTHING) == host_memory(plan, 0)
