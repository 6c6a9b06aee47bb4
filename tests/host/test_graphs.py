"""Decode steps as graphs give the tokens of plain steps: on tapes where there is no GPU, on CUDA graphs else."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, MiniCPM3Config, Phi3Config, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from apb.decode import decoder
from apb.decode.lookup import Lookup
from apb.draft.draft import Draft
from apb.draft.spec import DraftSpec
from apb.graphs.capture import WARM_UPS, Capture, CudaCapture, Pieces
from apb.layers.call import Call, plain
from apb.models.adapter import Adapter
from apb.models.graphed import GraphedAdapter
from apb.models.hooks import FINAL
from apb.strategies import strategy
from burst.errors import UserError
from tests.support.asking import SAMPLED, VOCAB
from tests.support.drafting import draft_head, engine, make_handoff, prompt
from tests.support.tape import Tape
from tests.support.tiny import TinyEngine, adapt, llama_config, tiny_engine

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 400, "pad_token_id": 0,
}  # fmt: skip
LATENT = {"kv_lora_rank": 24, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "granite": GraniteConfig(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "minicpm3": MiniCPM3Config(**SIZES | {"num_key_value_heads": 4}, **LATENT),
}


def taped(e: TinyEngine) -> list[Tape]:
    """Let every host's decode steps run as graphs."""
    tapes = [Tape() for _ in range(e.setup.hosts)]
    for rank, tape in enumerate(tapes):
        e.cluster.host(rank).capture = tape  # type: ignore[attr-defined]
    return tapes


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name, hosts, adaptive", [("full", 1, 0), ("apb", 3, 0), ("ring", 2, 40)])
def test_tokens_are_those_of_plain_steps(name: str, hosts: int, adaptive: int, options: dict[str, Any]) -> None:
    e = engine(hosts, name, adaptive=adaptive)
    handle = e.prefill(prompt())
    made = [
        decoder("autoregressive"),
        decoder("eagle2", depth=3, width=3, tokens=8),
        decoder("eagle2", width=1, tokens=5),
    ]
    plain = [e.generate(handle.fork(), 24, each, **options) for each in made]
    tapes = taped(e)
    for each, want in zip(made, plain, strict=True):
        before = [tape.replays for tape in tapes]
        got = e.generate(handle.fork(), 24, each, **options)
        assert got.token_ids == want.token_ids
        assert got.metrics["accepted_length"] == want.metrics["accepted_length"]
        ran = [tape.replays - b for tape, b in zip(tapes, before, strict=True)]
        assert min(ran) >= 4 * (3 + 1), "three layers are cut into four pieces, and several steps have full size"
        assert got.metrics["drafting"] is None or ran[-1] > ran[0] or hosts == 1, (
            "the owner's drafts run as graphs, too"
        )


def test_trees_of_other_sizes_run_as_ever() -> None:
    e = engine(2)
    handle = e.prefill(prompt())
    want = e.generate(handle.fork(), 20, Lookup(tokens=6))
    tapes = taped(e)
    assert e.generate(handle.fork(), 20, Lookup(tokens=6)).token_ids == want.token_ids
    assert all(tape.captures <= 2 for tape in tapes), "steps of one token, and of six"


class Remembering:
    """Attention that lets every token see itself, and remembers what it was given."""

    needs_projections = False

    def __init__(self) -> None:
        self.layers: list[int] = []

    def __call__(self, call: Call) -> Tensor:
        q, _, v, _ = plain(call)
        self.layers.append(call.layer)
        q.mul_(0)  # its own until it returns
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2)


def both(adapter: Adapter, capture: Capture, rows: int, taps: tuple[int, ...] | None, seed: int) -> None:
    """Compare a step of random tokens with the graphed one, logits and features."""
    graphed = GRAPHED.setdefault(id(capture), GraphedAdapter(adapter, capture))
    graphed.only({1, 5})
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (rows,), generator=gen).to(adapter.device)
    at = torch.randint(0, 300, (rows,), generator=gen).to(adapter.device)
    found = []
    with torch.inference_mode():
        for each in (adapter, graphed):
            attention = Remembering()
            with each.capturing(taps) as features:
                logits = each.all_logits(ids, at, attention)
            found.append((logits, {tap: part.clone() for tap, part in features.parts.items()}))
            assert attention.layers == [0, 1, 2]
    (want, want_parts), (got, parts) = found
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert parts.keys() == want_parts.keys() == ({*(taps or (FINAL,))} if taps is not None else set())
    for tap, part in parts.items():
        torch.testing.assert_close(part, want_parts[tap], atol=1e-5, rtol=1e-5)


GRAPHED: dict[int, GraphedAdapter] = {}


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name: str) -> None:
    adapter, tape = adapt(CONFIGS[name]), Tape()
    assert adapter.fixed
    for seed, (rows, taps) in enumerate([(1, None), (5, ()), (1, None), (5, ()), (5, (0, 2)), (5, (0, 2))]):
        both(adapter, tape, rows, taps, seed)
    assert tape.captures == 3, "a capture for each size and each set of features"


def test_results_outlive_the_next_step() -> None:
    graphed = GraphedAdapter(adapt(CONFIGS["llama"]), Tape())
    graphed.only({4})

    def step(first: int) -> list[Tensor]:
        with torch.inference_mode(), graphed.capturing(()) as features:
            ids = torch.arange(first, first + 4)
            return [graphed.all_logits(ids, ids, Remembering()), features.parts[FINAL]]

    kept = step(1)
    copies, other = [x.clone() for x in kept], step(100)
    for mine, was, theirs in zip(kept, copies, other, strict=True):
        assert torch.equal(mine, was) and not torch.equal(mine, theirs)


def test_experts_are_not_captured() -> None:
    config = Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    assert not adapt(config).fixed


def test_pieces_are_cut_where_attention_is_called() -> None:
    def fn(x: Tensor, y: Tensor, cut: Any) -> Tensor:
        return cut("first", x + y) * 2 + cut("second", x * y)

    tape, seen = Tape(), list[str]()

    def attend(name: str, x: Tensor) -> Tensor:
        seen.append(name)
        return x + 1

    with torch.inference_mode():
        pieces = Pieces(fn, (torch.zeros(3), torch.zeros(3)), lambda name, x: torch.empty_like(x), tape)
        assert not seen, "attention is not called by a capture"
        one = pieces((torch.full((3,), 2.0), torch.full((3,), 5.0)), attend)
        assert one.tolist() == [8 * 2 + 11] * 3 and seen == ["first", "second"] and tape.replays == 3
        two = pieces((torch.full((3,), 1.0), torch.full((3,), 1.0)), attend)
        assert two is one and two.tolist() == [3 * 2 + 2] * 3, "the result lies where the last one lay"


def test_a_capture_that_fails_says_why() -> None:
    def reads(x: Tensor, cut: Any) -> Tensor:
        return cut(x) * float(x.sum())

    def no_room(x: Tensor) -> Tensor:  # is asked between two pieces, when the first one has ended
        if next(asked) > WARM_UPS:
            raise torch.OutOfMemoryError("no room")
        return torch.empty_like(x)

    asked = itertools.count(1)
    for fn, blank, why in (
        (reads, torch.empty_like, "item cannot be captured"),
        (lambda x, cut: cut(x), no_room, "no room"),
    ):
        with torch.inference_mode(), pytest.raises(UserError, match=why) as failed:
            Pieces(fn, (torch.ones(2),), blank, Tape())
        assert "decode.graphs=false" in failed.value.remedy and isinstance(failed.value.__cause__, RuntimeError)
        assert float(torch.ones(2).sum()) == 2.0, "nothing is taped any more"


def test_graphs_of_other_sizes_are_given_up() -> None:
    tape = Tape()
    graphed = GraphedAdapter(adapt(CONFIGS["llama"]), tape)
    for sizes, captures in (({1, 4}, 2), ({1, 4}, 2), ({1}, 2), ({1, 4}, 3)):
        graphed.only(sizes)
        with torch.inference_mode():
            for rows in (1, 4):
                ids = torch.arange(rows)
                graphed.all_logits(ids, ids, Remembering())
        assert tape.captures == captures


def test_trees_sized_by_measured_times_are_verified_without_graphs() -> None:
    e = engine(2)
    handle = e.prefill(prompt())
    auto = decoder("eagle2", depth=3, width=3, tokens=8, tree="auto")
    want = e.generate(handle.fork(), 20, auto)
    tapes = taped(e)
    assert e.generate(handle.fork(), 20, auto).token_ids == want.token_ids
    assert tapes[0].captures == 0 and tapes[1].captures > 0, "only the owner's draft head has graphs"
    assert not e.cluster.host(1)._graphed._pieces  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_cuda_graphs_of_architectures(name: str) -> None:
    adapter = adapt(CONFIGS[name])
    adapter._model.to("cuda")
    capture = CudaCapture(adapter.device)
    for seed, (rows, taps) in enumerate([(1, None), (5, ()), (1, None), (5, ()), (5, (0, 2)), (5, (0, 2))]):
        both(adapter, capture, rows, taps, seed)


@pytest.mark.gpu
def test_cuda_graphs_share_memory_that_outlives_them() -> None:
    capture, one = CudaCapture(torch.device("cuda", 0)), torch.ones(3, device="cuda")
    for _ in range(3):
        with torch.inference_mode():
            pieces = Pieces(lambda x, cut: cut(x + 1) * 2, (one,), torch.empty_like, capture)
            assert pieces((one,), lambda x: x + 1).tolist() == [6.0] * 3
        del pieces


@pytest.mark.gpu
@pytest.mark.parametrize("hosts", [1, 3])
def test_cuda_graphs_decode_the_same_tokens(hosts: int) -> None:
    adapter = adapt(llama_config(vocab_size=VOCAB, max_position_embeddings=400))
    adapter._model.to("cuda")
    e = tiny_engine(
        adapter, strategy("apb" if hosts > 1 else "full"), hosts, "query" if hosts > 1 else None, device="cuda"
    )
    handle = e.prefill(prompt())
    lookup = Lookup(tokens=6)
    found = []
    for graphs in (False, True):
        for rank in range(hosts):
            e.cluster.host(rank).capture = CudaCapture(adapter.device) if graphs else None  # type: ignore[attr-defined]
        found.append([e.generate(handle.fork(), 30, each).token_ids for each in (decoder("autoregressive"), lookup)])
    assert found[0] == found[1]


@pytest.mark.parametrize("tree", ["fixed", "auto"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_answers_outlive_the_graphs_of_earlier_ones(device: str, tree: str) -> None:
    """With ``auto`` the draft head's steps alone are captured, and no graph is left when an answer ends."""
    adapter = adapt(llama_config(vocab_size=VOCAB, max_position_embeddings=400), torch.float64)
    adapter._model.to(device)
    adapter.draft = Draft(draft_head(adapter).to(device))
    e = tiny_engine(adapter, strategy("full"), 1, None, device=device)
    spec = dataclasses.replace(e.setup.spec, draft=DraftSpec("tiny"))
    e.setup = dataclasses.replace(e.setup, spec=spec, handoff=make_handoff(adapter.draft))
    handle = e.prefill(prompt())
    drafting, lengths, found = decoder("eagle2", depth=3, width=3, tokens=8, tree=tree), (3, 3, 30), []
    for capture in (None, CudaCapture(adapter.device) if device == "cuda" else Tape()):
        e.cluster.host(0).capture = capture  # type: ignore[attr-defined]
        found.append([e.generate(handle.fork(), length, drafting).token_ids for length in lengths])
    assert found[0] == found[1] and len(found[0][-1]) == 30
