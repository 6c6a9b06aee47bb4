"""Draft heads: published formats against the layer written out, what they share, and the files that are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from apb.draft import DraftHead, Target, files, load, save
from apb.draft.eagle import EagleHead
from burst.errors import UserError
from tests.support.tiny import adapt, llama_config

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 8, 64, 96, 4, 2, 300
HEAD_DIM, EPS, THETA = HIDDEN // HEADS, 1e-5, 10000.0
TOKENS = 9
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def target() -> Target:
    """What heads share with a random Llama of eight layers, fp64."""
    config = llama_config(num_hidden_layers=LAYERS, vocab_size=VOCAB, rope_theta=THETA)
    return adapt(config, torch.float64).draft_target()


def config(**changes: Any) -> dict[str, Any]:
    """Return what published configurations hold."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "rms_norm_eps": EPS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
    } | changes


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=rng, dtype=torch.float64) / s[-1] ** 0.5 for n, s in shapes.items()}


def layer_shapes(prefix: str, inputs: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (HIDDEN, inputs),
        "self_attn.k_proj.weight": (kv, inputs),
        "self_attn.v_proj.weight": (kv, inputs),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    if bias:
        shapes |= {f"self_attn.{x}_proj.bias": (HIDDEN if x == "q" else kv,) for x in "qkv"}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def eagle_weights(fc_bias: bool, qkv_bias: bool) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (HIDDEN, 2 * HIDDEN)}
    if fc_bias:
        shapes["fc.bias"] = (HIDDEN,)
    return random_weights(shapes | layer_shapes("layers.0", HIDDEN, qkv_bias))


def write(folder: Path, made: dict[str, Any], weights: Weights, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made))
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return folder


# -- the layer, written out -----------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def turned(x_SHD: Tensor, positions: list[float], theta: float = THETA) -> Tensor:
    half = HEAD_DIM // 2
    out = x_SHD.clone()
    for s, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-i / half)
            a, b = x_SHD[s, :, i], x_SHD[s, :, i + half]
            out[s, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[s, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(w: Weights, prefix: str, x_SE: Tensor, positions: list[int]) -> Tensor:
    def projected(name: str) -> Tensor:
        bias = w.get(f"{prefix}.{name}_proj.bias")
        return F.linear(x_SE, w[f"{prefix}.{name}_proj.weight"], bias).unflatten(-1, (-1, HEAD_DIM))

    q, k, v = turned(projected("q"), positions), turned(projected("k"), positions), projected("v")
    rows = []
    for s in range(len(x_SE)):
        heads = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            p = (k[: s + 1, kv] @ q[s, h] / HEAD_DIM**0.5).softmax(0)
            heads.append(p @ v[: s + 1, kv])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w[f"{prefix}.o_proj.weight"].T


def network(w: Weights, prefix: str, x_SE: Tensor) -> Tensor:
    gate, up = (x_SE @ w[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate * torch.sigmoid(gate) * up) @ w[f"{prefix}.down_proj.weight"].T


def eagle(w: Weights, embedded: Tensor, feature: Tensor, positions: list[int]) -> Tensor:
    h = torch.cat([embedded, feature], -1) @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(1))
    h = h + attention(w, "layers.0.self_attn", h, positions)
    return h + network(w, "layers.0.mlp", norm(h, w["layers.0.post_attention_layernorm.weight"]))


def eagle3(w: Weights, embedded: Tensor, feature: Tensor, positions: list[int]) -> Tensor:
    h = feature @ w["fc.weight"].T
    normed = [norm(embedded, w["midlayer.input_layernorm.weight"]), norm(h, w["midlayer.hidden_norm.weight"])]
    h = h + attention(w, "midlayer.self_attn", torch.cat(normed, -1), positions)
    return h + network(w, "midlayer.mlp", norm(h, w["midlayer.post_attention_layernorm.weight"]))


def minicpm(w: Weights, embedded: Tensor, feature: Tensor, positions: list[int]) -> Tensor:
    scale = 1.4 / (LAYERS + 1) ** 0.5
    normed = [norm(embedded, w["input_norm1.weight"]), norm(feature, w["input_norm2.weight"])]
    h = torch.cat(normed, -1) @ w["fc.weight"].T
    h = h + scale * attention(w, "layers.0.self_attn", norm(h, w["layers.0.input_layernorm.weight"]), positions)
    return h + scale * network(w, "layers.0.mlp", norm(h, w["layers.0.post_attention_layernorm.weight"]))


def stepped(head: DraftHead, features: Tensor, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run the head over a sequence with causal attention; return its output and the keys and values it was given."""
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return head.step(head.fuse(features), ids, positions, attend), seen[0]


def agrees(head: DraftHead, weights: Weights, naive: Callable[..., Tensor]) -> Tensor:
    """Check the head's layer against ``naive`` and its keys and values against what it attends with."""
    rng = torch.Generator().manual_seed(5)
    width = HIDDEN * max(1, len(head.taps))
    features = torch.randn(1, TOKENS, width, generator=rng, dtype=torch.float64)
    ids = torch.randint(VOCAB, (1, TOKENS), generator=rng)
    positions = torch.tensor([0, 1, 2, 3, 700, 701, 702, 703, 704])
    out, attended = stepped(head, features, ids, positions)
    expected = naive(weights, head.target.embedding_WE[ids[0]], features[0], positions.tolist())
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)  # the target's rotation is computed in fp32
    for made, given in zip(head.keys_values(head.fuse(features), ids, positions), attended, strict=True):
        torch.testing.assert_close(made, given, atol=0, rtol=0)
    return out


# -- positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "theta", "slower"),
    [
        ({}, THETA, 1.0),  # nothing named: as the target
        ({"rope_theta": None, "rope_scaling": None}, THETA, 1.0),
        ({"rope_theta": 500.0, "rope_scaling": None}, 500.0, 1.0),
        ({"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 4.0}}, 500.0, 4.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, THETA, 2.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}, 700.0, 1.0),
    ],
)
def test_a_head_turns_to_positions_as_its_own_configuration_says(
    target: Target, tmp_path: Path, named: dict[str, Any], theta: float, slower: float
) -> None:
    head = load(write(tmp_path / "head", config(bias=False) | named, eagle_weights(False, False)), target)
    features, ids = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64), torch.arange(TOKENS)[None]
    at = [0, 1, 2, 3, 700, 701, 702, 703, 704]
    still, _ = head.keys_values(features, ids, torch.zeros(TOKENS, dtype=torch.int64))  # not turned at all
    keys, _ = head.keys_values(features, ids, torch.tensor(at))
    want = turned(still[0].transpose(0, 1), [position / slower for position in at], theta).transpose(0, 1)
    torch.testing.assert_close(keys[0], want, atol=1e-4, rtol=1e-4)  # angles are fp32
    _, attended = stepped(head, features, ids, torch.tensor(at))
    torch.testing.assert_close(attended[0], keys, atol=0, rtol=0)


def test_a_head_of_a_scaled_target_is_scaled_only_if_it_says_so(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    own = llama_config(num_hidden_layers=LAYERS, vocab_size=VOCAB, rope_theta=THETA, rope_scaling=scaling)
    scaled = adapt(own, torch.float64).draft_target()
    features, ids = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64), torch.arange(TOKENS)[None]
    found = []
    for i, named in enumerate(({}, {"rope_theta": THETA, "rope_scaling": scaling}, {"rope_theta": THETA})):
        made = write(tmp_path / str(i), config(bias=False) | named, eagle_weights(False, False))
        found.append(load(made, scaled).keys_values(features, ids, torch.arange(900, 900 + TOKENS))[0])
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


# -- formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "qkv_bias", "name"),
    [(None, False, "pytorch_model.bin"), (False, False, "model.safetensors"), (True, True, "model.safetensors")],
)
def test_published_eagle_heads(target: Target, tmp_path: Path, bias: bool | None, qkv_bias: bool, name: str) -> None:
    weights = eagle_weights(fc_bias=bias is not False, qkv_bias=qkv_bias)
    made = config() if bias is None else config(bias=bias)  # without the key, fc has a bias
    stored = weights | {"embed_tokens.weight": target.embedding_WE.clone()}
    head = load(write(tmp_path / "head", made, stored, name), target)
    assert isinstance(head, EagleHead) and head.taps == ()
    check_footprint(tmp_path / "head", head)
    out = agrees(head, weights, eagle)
    torch.testing.assert_close(head.logits(out), out @ target.head_WE.T)
    few = head.with_vocab(torch.tensor([7, 3, 250]))
    torch.testing.assert_close(few.logits(out), head.logits(out)[..., [7, 3, 250]])
    assert few.ids_V.tolist() == [7, 3, 250] and len(head.ids_V) == VOCAB
    assert next(few.parameters()) is next(head.parameters())


def check_footprint(folder: Path, head: DraftHead) -> None:
    """Check what is known of a head before it is loaded."""
    width = HIDDEN * max(1, len(head.taps))
    assert files.footprint(folder) == (sum(p.numel() for p in head.parameters()), width)


def eagle3_file(drafted: list[int]) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.input_layernorm.weight": (HIDDEN,),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (len(drafted), HIDDEN),
    }
    weights = random_weights(shapes | layer_shapes("midlayer", 2 * HIDDEN))
    in_draft = torch.zeros(VOCAB, dtype=torch.bool)
    in_draft[drafted] = True
    return weights | {"d2t": torch.tensor(drafted) - torch.arange(len(drafted)), "t2d": in_draft}


def test_published_eagle3_heads(target: Target, tmp_path: Path) -> None:
    drafted = [2, 5, 6, 40, 41, 299]
    weights = eagle3_file(drafted)
    head = load(write(tmp_path / "head", config(draft_vocab_size=6), weights), target)
    assert head.taps == (2, 4, 5) and head.ids_V.tolist() == drafted
    check_footprint(tmp_path / "head", head)
    out = agrees(head, weights, eagle3)
    torch.testing.assert_close(head.logits(out), norm(out, weights["norm.weight"]) @ weights["lm_head.weight"].T)
    few = head.with_vocab(torch.tensor([299, 5]))
    assert few.ids_V.tolist() == [299, 5]
    torch.testing.assert_close(few.logits(out), head.logits(out)[..., [5, 1]])
    again = few.with_vocab(torch.tensor([6, 40]))  # drafted from the whole head's rows, not the subset's
    torch.testing.assert_close(again.logits(out), head.logits(out)[..., [2, 3]])


def test_eagle3_heads_of_all_ids_and_of_other_layers(target: Target, tmp_path: Path) -> None:
    weights = eagle3_file(list(range(VOCAB)))
    whole = without(without(weights, "d2t"), "t2d")  # there is nothing to map
    for i, named in enumerate(("eagle_config", None)):
        chosen = {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}
        made = config() | (chosen if named is None else {named: chosen})
        head = load(write(tmp_path / str(i), made, whole), target)
        assert head.taps == (1, 3, 7) and head.ids_V.tolist() == list(range(VOCAB))
        agrees(head, weights, eagle3)
    for wrong in ([1, 3], [1, 3, 9], [1, 3, -1], [1, 3, "last"], 3):
        made = config(eagle_aux_hidden_state_layer_ids=wrong)
        with pytest.raises(UserError, match="eagle_aux_hidden_state_layer_ids"):
            load(write(tmp_path / "wrong", made, weights), target)


def test_published_minicpm_heads(target: Target, tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (HIDDEN, 2 * HIDDEN),
        "input_norm1.weight": (HIDDEN,),
        "input_norm2.weight": (HIDDEN,),
        "layers.0.input_layernorm.weight": (HIDDEN,),
    }
    weights = random_weights(shapes | layer_shapes("layers.0", HIDDEN))
    stored = {f"model.{name}": tensor for name, tensor in weights.items()}  # CPM.cu's names
    made = config(scale_depth=1.4, scale_emb=1, dim_model_base=HIDDEN, sliding_window=128, mup_denominator=32)
    head = load(write(tmp_path / "head", made, stored), target)
    assert head.window == 128
    check_footprint(tmp_path / "head", head)
    agrees(head, weights, minicpm)
    with pytest.raises(UserError, match="another model") as refused:
        load(write(tmp_path / "scaled", made | {"scale_emb": 12}, stored), target)
    assert "scale_emb=12" in refused.value.given


def test_our_own_files_come_back(target: Target, tmp_path: Path) -> None:
    head = EagleHead.fresh(target, window=32, sinks=2, seed=3).double()
    save(tmp_path / "own.safetensors", head, {"model": "tiny"}, torch.float64)
    back = load(tmp_path / "own.safetensors", target)
    assert (back.window, back.sinks, back.about["model"]) == (32, 2, "tiny")
    for (name, a), (_, b) in zip(head.named_parameters(), back.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=name)
        assert not b.requires_grad


def test_a_scaled_embedding_is_absorbed(target: Target) -> None:
    scaled = dataclasses.replace(target, embedding_scale=6.0)
    head = EagleHead.fresh(scaled, window=None, sinks=0).double()
    features = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    ids, positions = torch.arange(TOKENS)[None], torch.arange(TOKENS)
    folded = head.absorbing(6.0, target).double()
    torch.testing.assert_close(
        stepped(head, features, ids, positions)[0], stepped(folded, features, ids, positions)[0], atol=1e-6, rtol=1e-6
    )


# -- refused --------------------------------------------------------------------------------------------


def without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, "hidden_size=128"),
        ({"vocab_size": 301}, "vocab_size=301"),
        ({"num_hidden_layers": 2}, "2 layers"),
        ({"num_attention_heads": 0}, "configuration"),
        ({"intermediate_size": None}, "configuration"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"rope_theta": "large"}, "rope_theta='large'"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "longrope"}}, "rope_type=longrope"),
        ({"rope_theta": 1e4, "rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "configuration lacks or misstates 'factor'"),
        ({"rope_theta": 1e4, "rope_scaling": [2.0]}, "rope_scaling"),
        ({"intermediate_size": 10**9}, "a width of 1000000000"),
        ({"head_dim": 10**9}, "a width of 4000000000"),
        ({"num_attention_heads": -4, "intermediate_size": -1}, "configuration"),
        ({"draft_sinks": "some"}, "some sinks"),
        ({"draft_window": 2.5}, "a window of 2.5"),
        ({"intermediate_size": 97}, "mlp.gate_proj.weight is (96, 64)"),
        ({}, "lacks the tensor fc.bias"),  # no key bias, so there is one
    ],
)
def test_configurations_that_do_not_fit(target: Target, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    made = config(**({"bias": False} | changes)) if changes else config()
    with pytest.raises(UserError) as refused:
        load(write(tmp_path / "head", made, eagle_weights(False, False)), target)
    assert words in str(refused.value) + str(refused.value.given)


def test_unsupported_positions_are_no_damage(target: Target, tmp_path: Path) -> None:
    made = config(bias=False) | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(UserError, match="positions") as refused:
        load(write(tmp_path / "head", made, eagle_weights(False, False)), target)
    assert refused.value.given == "rope_type=dynamic" and refused.value.allowed == "default, linear, llama3, yarn"
    assert "Copy it again" not in refused.value.remedy


def test_files_that_are_no_heads(target: Target, tmp_path: Path) -> None:
    weights, made = eagle_weights(False, False), config(bias=False)

    def refused(words: str, path: Path) -> None:
        with pytest.raises(UserError, match=words):
            load(path, target)

    refused("lacks the tensor fc.weight", write(tmp_path / "a", made, without(weights, "fc.weight")))
    lacking = without(weights, "layers.0.mlp.up_proj.weight")
    refused("lacks the tensor layers.0.mlp.up_proj.weight", write(tmp_path / "b", made, lacking))
    refused("layers.1.x", write(tmp_path / "c", made, weights | {"layers.1.x": torch.ones(1)}))
    other = weights | {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN, dtype=torch.float64)}
    refused("another model", write(tmp_path / "d", made, other))
    short = weights | {"embed_tokens.weight": target.embedding_WE[:200].clone()}
    refused("another model", write(tmp_path / "e", made, short))
    refused("lacks the tensor d2t", write(tmp_path / "f", made, without(eagle3_file([1, 2]), "d2t")))
    twice = eagle3_file([1, 2]) | {"d2t": torch.tensor([1, 0])}
    refused("twice to one", write(tmp_path / "g", made, twice))
    damaged = write(tmp_path / "h", made, weights)
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    refused("too few for its header", damaged)
    unreadable = write(tmp_path / "i", made, weights, "pytorch_model.bin")
    (unreadable / "pytorch_model.bin").write_bytes(b"no pickle")
    refused("cannot be used", unreadable)
    (write(tmp_path / "j", made, weights) / "config.json").write_text("{")
    refused("no JSON", tmp_path / "j")
    (tmp_path / "empty").mkdir()
    refused("lacks config.json", tmp_path / "empty")
    save_file(weights, tmp_path / "bare.safetensors")
    refused("no configuration", tmp_path / "bare.safetensors")
    refused("no draft head", tmp_path / "nowhere")


def test_a_head_of_another_base_model_is_told_by_its_embeddings(target: Target, tmp_path: Path) -> None:
    save(tmp_path / "own.safetensors", EagleHead.fresh(target, window=None, sinks=0), {})
    twin = llama_config(num_hidden_layers=LAYERS, vocab_size=VOCAB, rope_theta=THETA)
    assert load(tmp_path / "own.safetensors", adapt(twin, torch.bfloat16).draft_target()).window is None
    with pytest.raises(UserError, match="another model"):
        load(tmp_path / "own.safetensors", adapt(twin, torch.float64, seed=1).draft_target())


def test_shipped_heads_are_found_by_name() -> None:
    for name, file in files.shipped().items():
        assert files.find(name) == file
    with pytest.raises(UserError, match="no draft head 'smollm2-136'"):
        files.find("smollm2-136")
