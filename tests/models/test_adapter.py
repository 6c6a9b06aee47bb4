"""The model adapter over architectures: equal to the model itself, to the dense twin, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

from apb.compress import Candidates, Compressor
from apb.compress.norm import Norm
from apb.layers.call import AttentionCall, plain
from apb.models.adapter import Adapter
from apb.models.checks import check_config
from apb.models.shape import model_shape
from apb.strategies import strategy
from burst.errors import UserError
from tests.support import tiny
from tests.support.families import FAMILIES, adapt_family
from tests.support.tiny import adapt, build, make_prompt, tiny_engine
from tests.support.twin import twin

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 600,
    "max_position_embeddings": 4096,
    "initializer_range": tiny.INIT,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama-yarn": lambda: transformers.LlamaConfig(**COMMON, rope_parameters=YARN),
    "llama3-rope": lambda: transformers.LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=16),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=None),
    "granite": lambda: transformers.GraniteConfig(
        **COMMON,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
    ),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "phi3-partial": lambda: transformers.Phi3Config(**COMMON, rope_parameters=PARTIAL),
    "phi": lambda: transformers.PhiConfig(**COMMON, rope_parameters=PARTIAL),  # turns half of a head, outside apply
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "mqa": lambda: transformers.LlamaConfig(**COMMON | {"num_key_value_heads": 1}),
    "glm": lambda: transformers.GlmConfig(**COMMON, head_dim=12, rope_parameters=PARTIAL),  # pairs (2i, 2i + 1)
    "glm-yarn": lambda: transformers.GlmConfig(
        **COMMON, head_dim=12, rope_parameters=YARN | {"partial_rotary_factor": 0.5}
    ),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON),
    "smollm3": lambda: transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 0]),  # layer 1 has no positions
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]()


def prompt_for(context: int = 211) -> Any:
    prompt = make_prompt(context)
    small = {name: tuple(i % 600 for i in getattr(prompt.question, name)) for name in ("before", "ids", "after")}
    question = type(prompt.question)(**small, text=None)
    return type(prompt)(tiny.random_ids(context, 5, vocab=600), prompt.head, question)


def test_full_attention_equals_the_model_itself(config: Any) -> None:
    prompt, model = prompt_for(), build(config)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        want = model(torch.tensor([prompt.token_ids])).logits[0, -1]
    engine = tiny_engine(adapt(config), strategy("full"), 1)
    handle = engine.prefill(prompt)
    torch.testing.assert_close(engine.logits(handle), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("select", ["query", "norm"])
def test_apb_equals_the_twin(config: Any, select: str) -> None:
    prompt, adapter = prompt_for(), adapt(config)
    want = twin(adapter, tiny.rotation(adapter), prompt, "apb", 3, select=select)
    engine = tiny_engine(adapter, strategy("apb"), 3, select)
    got = engine.logits(engine.prefill(prompt))
    torch.testing.assert_close(got, want.logits, atol=1e-4, rtol=1e-4)


# -- rotation -------------------------------------------------------------------------------------------


class Recorder:
    """Attention that keeps the rotated queries and keys of every layer and answers with the values."""

    needs_projections = False

    def __init__(self) -> None:
        self.q: list[Tensor] = []
        self.k: list[Tensor] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        q_BHSD, k_BKSD, v_BKSD, _ = plain(call)
        self.q.append(q_BHSD)
        self.k.append(k_BKSD)
        group = q_BHSD.shape[1] // k_BKSD.shape[1]
        return v_BKSD.repeat_interleave(group, 1).transpose(1, 2)  # no token sees another: positions do not matter


@pytest.mark.parametrize("delta", [0, 1, 37, 900, -20])
def test_rotating_on_equals_rotating_from_scratch(config: Any, delta: int) -> None:
    adapter, ids = adapt(config), torch.tensor(tiny.random_ids(12, 1, vocab=600))
    here, there = Recorder(), Recorder()
    start = 25
    with torch.inference_mode():
        adapter.run(ids, torch.arange(start, start + 12), here)
        adapter.run(ids, torch.arange(start, start + 12) + delta, there)
        for layer in range(2):
            for a, b in ((here.q, there.q), (here.k, there.k)):
                # Angles are computed in fp32: an angle of 900 is known to 6e-5.
                torch.testing.assert_close(adapter.rotate(a[layer], delta, layer), b[layer], atol=2e-3, rtol=1e-3)
        assert delta == 0 or (here.q[0] - there.q[0]).abs().max() > 0.1  # or nothing was tested


# -- refusals -------------------------------------------------------------------------------------------

DYNAMIC = YARN | {"rope_type": "dynamic"}
REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "dynamic": ("rope_type", lambda: transformers.LlamaConfig(**COMMON, rope_parameters=DYNAMIC)),
    "images": ("other inputs than text", transformers.Gemma3Config),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_attention_is_rejected_by_name(name: str) -> None:
    word, make = REFUSED[name]
    with pytest.raises(UserError, match=word) as caught:
        check_config(make())
    assert caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_does_not_look_like_another_rotation(config: Any, dtype: torch.dtype) -> None:
    assert adapt(config, dtype).dtype == dtype


def test_a_mask_and_a_plain_call_are_refused_by_name() -> None:
    config = CONFIGS["llama"]()
    model = build(config)
    Adapter(model, model_shape(copy.deepcopy(config), torch.float32))
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        with pytest.raises(UserError, match="distributed attention"):
            model(ids, use_cache=False)
        with pytest.raises(UserError, match="attention_mask"):
            model(ids, attention_mask=torch.zeros(1, 1, 5, 5), use_cache=False, apb_attention=Recorder())
        for name, value in (("softcap", 30.0), ("sliding_window", 9), ("s_aux", torch.zeros(4))):
            with pytest.raises(UserError, match=name):
                model(ids, use_cache=False, apb_attention=Recorder(), **{name: value})
        model.config._attn_implementation = "apb"
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        model.train()
        with pytest.raises(UserError, match="dropout"):
            model(ids, use_cache=False, apb_attention=Recorder())


UNFIT: dict[str, tuple[str, Callable[[], Any]]] = {
    "other projections": ("GPT2Model", lambda: transformers.GPT2Config(n_layer=2, n_embd=48, n_head=4)),
    "positions in scores": ("BloomModel", lambda: transformers.BloomConfig(n_layer=2, hidden_size=48, n_head=4)),
    "keywords dropped": (
        "StableLmForCausalLM.*keywords",
        lambda: transformers.StableLmConfig(**COMMON, rope_parameters=PARTIAL),
    ),
    "keywords dropped too": (
        "NemotronForCausalLM.*keywords",
        lambda: transformers.NemotronConfig(**COMMON, rope_parameters=PARTIAL),
    ),
    "attention twice a layer": (
        r"DiffLlamaForCausalLM.*in the order \[0, 0, 1, 1\]",
        lambda: transformers.DiffLlamaConfig(**COMMON),
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_attend_otherwise_are_refused_when_loaded(name: str) -> None:
    match, make = UNFIT[name]
    config = make()
    check_config(config)
    with pytest.raises(UserError, match=match) as caught:
        adapt(config)
    assert caught.value.remedy


def test_a_norm_after_rope_is_exact_and_turns_nothing() -> None:
    config = transformers.HunYuanDenseV1Config(**COMMON, head_dim=12)
    model, prompt = build(config), prompt_for()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        want = model(torch.tensor([prompt.token_ids])).logits[0, -1]
    for name in ("ring", "star"):
        engine = tiny_engine(adapt(config), strategy(name), 3)
        got = engine.logits(engine.prefill(prompt))
        assert name == "star" or (got - want).abs().max() < 1e-4
    with pytest.raises(UserError, match="cannot be turned on"):
        tiny_engine(adapt(config), strategy("apb"), 3, "query").prefill(prompt)


def test_attention_that_looks_ahead_is_refused() -> None:
    model = build(CONFIGS["llama"]())
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UserError, match="is_causal"):
        Adapter(model, model_shape(CONFIGS["llama"](), torch.float32))


@pytest.mark.parametrize("make", [transformers.ViTConfig, lambda: transformers.Lfm2MoeConfig(layer_types=None)])
def test_a_configuration_of_no_decoder_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match="no decoder can be made"):
        model_shape(make(), torch.float32)


@pytest.mark.parametrize(
    "family, changes", [("gpt_oss", {"sliding_window": 0}), ("llama4", {"attention_chunk_size": -4})]
)
def test_windows_of_no_token_are_refused_before_any_weight(family: str, changes: dict[str, Any]) -> None:
    ((name, size),) = changes.items()
    with pytest.raises(UserError, match=f"{name} is {size}"):
        model_shape(FAMILIES[family].config(**changes), torch.float32)


# -- projections ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spy(Compressor):
    """Keeps what it is shown; selects like the key norms do."""

    name: ClassVar[str] = "spy"
    needs_projections: ClassVar[bool] = True

    seen: dict[tuple[int, int], Candidates] = field(default_factory=dict)

    def score(self, block: Candidates) -> Tensor:
        self.seen[block.rank, block.layer] = block
        return Norm().score(block)


def module_projections(adapter: Adapter, layer: int, hidden: Tensor) -> list[Tensor]:
    attention = adapter._model.base_model.layers[layer].self_attn
    if hasattr(attention, "qkv_proj"):
        s = adapter.shape
        sizes = [s.heads.q_heads * s.heads.qk_dim, s.heads.kv_heads * s.heads.qk_dim, s.heads.kv_heads * s.heads.qk_dim]
        return list(attention.qkv_proj(hidden).split(sizes, dim=-1))
    return [getattr(attention, f"{name}_proj")(hidden) for name in "qkv"]


def test_compressors_see_each_ranks_own_projections_before_rope(config: Any) -> None:
    adapter, prompt, spy = adapt(config), prompt_for(), Spy()
    engine = tiny_engine(adapter, strategy("apb"), 4, spy)
    want = engine.logits(engine.prefill(prompt))
    plan = engine.setup.plan(prompt)
    assert set(spy.seen) == {(rank, layer) for rank in range(3) for layer in range(2)}
    base = adapter._model.base_model
    scale = getattr(adapter._model.config, "embedding_multiplier", 1.0)
    with torch.inference_mode():
        for rank in range(3):  # layer 0 sees the embeddings alone, so its projections are known
            host = plan.host_plans[rank]
            ids = torch.tensor([prompt.context_ids[host.start : host.stop]])
            hidden = base.embed_tokens(ids) * scale
            norm_first = getattr(base.layers[0], "input_layernorm", None)
            hidden = norm_first(hidden) if norm_first is not None else hidden
            shown = spy.seen[rank, 0].projections
            assert shown is not None
            for mine, theirs in zip(
                (shown.q_BSP, shown.k_BSP, shown.v_BSP), module_projections(adapter, 0, hidden), strict=True
            ):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
            for layer in range(2):  # values are not rotated: each layer's must be the cached ones
                block = spy.seen[rank, layer]
                assert block.projections is not None
                flat = block.v_BKSD.transpose(1, 2).flatten(2)
                torch.testing.assert_close(block.projections.v_BSP, flat, atol=0, rtol=0)
                assert block.projections.q_BSP.shape[1] == host.block_len
    again = tiny_engine(adapter, strategy("apb"), 4, "norm")
    torch.testing.assert_close(again.logits(again.prefill(prompt)), want, atol=0, rtol=0)


@pytest.mark.parametrize("family, lacking", [("gemma4", "v_proj"), ("qwen3_next", "q_proj")])
@pytest.mark.parametrize("chunk", [None, 7])
def test_layers_without_such_projections_are_rejected(family: str, lacking: str, chunk: int | None) -> None:
    """Gemma 4 makes values of its keys' projection, Qwen3-Next's q_proj holds a gate as well."""
    engine = tiny_engine(adapt_family(family), strategy("apb"), 3, Spy())
    engine.setup = dataclasses.replace(engine.setup, chunk_tokens=chunk)
    with pytest.raises(UserError, match=f"a layer lacks {lacking}"):
        engine.prefill(prompt_for())


def test_windows_need_no_projections_of_their_own() -> None:
    adapter, spy = adapt_family("gpt_oss"), Spy()
    engine = tiny_engine(adapter, strategy("apb"), 3, spy)
    want = tiny_engine(adapter, strategy("apb"), 3, "norm")
    prompt = prompt_for()
    torch.testing.assert_close(engine.logits(engine.prefill(prompt)), want.logits(want.prefill(prompt)), atol=0, rtol=0)
    assert {layer for _, layer in spy.seen} == {1}


# -- draft heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "olmo3", "mimo_v2_flash", "smollm3"])
def test_a_draft_head_brings_its_own_rope_to_models_with_one_or_several(family: str) -> None:
    theta, at, gen = 500.0, torch.tensor([0, 3, 50]), torch.Generator().manual_seed(0)
    adapter = adapt_family(family)
    rotate = adapter.draft_target().rotation({"rope_type": "default", "rope_theta": theta})
    x = torch.randn(1, 2, 3, adapter.shape.heads.qk_dim, generator=gen)
    config = adapter._model.config
    full = config.rope_parameters.get("full_attention", config.rope_parameters)
    turned = int(x.shape[-1] * full.get("partial_rotary_factor", 1.0))
    angle = at[:, None] * theta ** (-torch.arange(0, turned, 2) / turned)
    a, b = x[..., : turned // 2], x[..., turned // 2 : turned]
    cos, sin = angle.cos(), angle.sin()
    want = torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., turned:]], dim=-1)
    torch.testing.assert_close(rotate(x, at), want, atol=1e-5, rtol=0)
