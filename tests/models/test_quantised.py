"""Quantised checkpoints: packed by hand as published files are, dequantised into every type, damage named."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from apb.engine.engine import Engine
from apb.models.checks import check_config
from apb.models.loading import load_config, load_model
from apb.models.shape import model_shape
from apb.prompt.prompt import Prompt, Question
from burst.errors import UserError
from tests.support.composites import composite, composite_config, plain, tensors, text_logits
from tests.support.tiny import build, byte_tokenizer

IDS_S = torch.arange(5, 60)
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def mxfp4(generator: torch.Generator, experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random blocks (E, rows, columns/32, 16), scales (E, rows, columns/32) and what they stand for."""
    codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), generator=generator)
    exponents = torch.randint(122, 128, (experts, rows, columns // 32), generator=generator)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4  # the low half of a byte is the first number
    numbers = _FP4[codes] * torch.exp2(exponents.float() - 127)[..., None]
    return blocks.to(torch.uint8), exponents.to(torch.uint8), numbers.reshape(experts, rows, columns).transpose(1, 2)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny gpt-oss with experts in MXFP4, and the plain model that it stands for."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, rope_parameters=rope
    )
    model, rng = plain(build(config)), torch.Generator().manual_seed(0)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            blocks, scales, numbers = mxfp4(rng, 4, rows, columns)
            with torch.no_grad():
                model.get_parameter(f"{stem}.{name}").copy_(numbers)
            del weights[f"{stem}.{name}"]
            weights |= {f"{stem}.{name}_blocks": blocks, f"{stem}.{name}_scales": scales}
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return save(tmp_path_factory.mktemp("mxfp4") / "gpt-oss", weights, config), model


def save(folder: Path, weights: dict[str, Tensor], config: Any) -> Path:
    folder.mkdir()
    values = config.to_dict() | {"quantization_config": config.quantization_config}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path, dtype: str = "float32") -> Any:
    return plain(load_model(folder, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_mxfp4_experts_are_dequantised_exactly(gpt_oss: tuple[Path, Any], dtype: str) -> None:
    folder, model = gpt_oss
    wanted = copy.deepcopy(model).to(getattr(torch, dtype))
    loaded = load(folder, dtype)
    assert {x.dtype for x in loaded.parameters()} == {getattr(torch, dtype)}
    for name, x in wanted.named_parameters():
        assert torch.equal(loaded.get_parameter(name), x), name
    if dtype == "float32":  # the twin's other types have rounded frequencies too
        assert torch.equal(text_logits(loaded, IDS_S), text_logits(wanted, IDS_S))


def test_hosts_prefill_what_was_dequantised(gpt_oss: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(gpt_oss[0], tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    ids = tuple((7 * i) % 120 + 1 for i in range(80))
    with Engine.launch(str(folder), hosts=3, strategy="ring", dtype="float32") as engine:
        found_V = engine.logits(engine.prefill(Prompt(ids[:74], 3, Question((), ids[74:], (), None))))
    assert torch.allclose(found_V, text_logits(gpt_oss[1], torch.tensor(ids))[-1], atol=1e-4)


def test_memory_is_that_of_the_parameters(gpt_oss: tuple[Path, Any]) -> None:
    folder, model = gpt_oss
    numbers = sum(x.numel() for x in model.parameters())
    assert model_shape(load_config(folder), torch.bfloat16).total_params == numbers
    assert (folder / "model.safetensors").stat().st_size < 4 * numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, n: w.pop(f"{n}_scales"), "_blocks has no _scales"),
        (lambda w, n: w.update({f"{n}_scales": w[f"{n}_scales"][:, :-1]}), "_blocks has no _scales"),
        (lambda w, n: w.pop(f"{n}_blocks"), r"lacks the tensor model\.layers\.1\.mlp\.experts\.gate_up_proj"),
        (lambda w, n: w.pop("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
        (lambda w, n: w.update({f"{n}_blocks": w[f"{n}_blocks"].to(torch.int32)}), r"gate_up_proj_blocks"),
    ],
)
def test_damaged_mxfp4_is_named(gpt_oss: tuple[Path, Any], tmp_path: Path, change: Any, message: str) -> None:
    weights, config = tensors(gpt_oss[0]), transformers.AutoConfig.from_pretrained(gpt_oss[0])
    change(weights, "model.layers.1.mlp.experts.gate_up_proj")
    with pytest.raises(UserError, match=message) as caught:
        load(save(tmp_path / "damaged", weights, config))
    assert "model.safetensors" in str(caught.value)


def fp8(weights: dict[str, Tensor], block: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a checkpoint with every projection in fp8 by blocks (None: one scale each), and what it stands for."""
    packed, meant = {}, {}
    for name, x in weights.items():
        packed[name] = meant[name] = x
        if "proj" not in name or x.dim() != 2:
            continue
        rows, columns = x.shape
        high, wide = (block, block) if block else (rows, columns)
        parts = x.reshape(rows // high, high, columns // wide, wide)
        scales = parts.abs().amax((1, 3)) / 448
        quantised = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        packed[name] = quantised.reshape(rows, columns)
        packed[f"{name}_scale_inv"] = scales if block else scales.reshape(())
        packed[f"{name.removesuffix('.weight')}.activation_scale"] = torch.tensor(1.0)
        meant[name] = (quantised.float() * scales[:, None, :, None]).reshape(rows, columns)
    return packed, meant


def _said(block: int | None) -> dict[str, Any]:
    size = None if block is None else [block, block]
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}


@pytest.mark.parametrize("block", [16, None])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_fp8_is_dequantised(kind: str, block: int | None, tmp_path: Path) -> None:
    made = {"qwen3": transformers.Qwen3Config, "qwen3_moe": transformers.Qwen3MoeConfig}[kind]
    config = made(**COMMON, **(MOE if kind == "qwen3_moe" else {}))
    build(config).save_pretrained(tmp_path / "plain")
    packed, meant = fp8(tensors(tmp_path / "plain"), block)
    assert sum(x.dtype == torch.float8_e4m3fn for x in packed.values()) >= 14
    config.quantization_config = _said(block)
    loaded = load(save(tmp_path / "packed", packed, config))
    config.quantization_config = None
    wanted = load(save(tmp_path / "meant", meant, config))
    assert {x.dtype for x in loaded.parameters()} == {torch.float32}
    assert torch.allclose(text_logits(loaded, IDS_S), text_logits(wanted, IDS_S), atol=1e-5)
    check_config(load_config(tmp_path / "packed"))
    check_config(loaded.config)


def test_the_fp8_tower_of_a_composite_is_dequantised(tmp_path: Path) -> None:
    model = composite(composite_config("mistral3"))
    model.save_pretrained(tmp_path / "plain")
    packed, meant = fp8(tensors(tmp_path / "plain"), None)
    model.config.quantization_config = _said(None)
    loaded = load(save(tmp_path / "packed", packed, model.config))
    model.config.quantization_config = None
    wanted = load(save(tmp_path / "meant", meant, model.config))
    assert torch.allclose(text_logits(loaded, IDS_S), text_logits(wanted, IDS_S), atol=1e-5)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, r"q_proj\.weight is packed as F8_E4M3 and has no"),
        ((2, 4), "cannot dequantise"),  # 64 rows are four blocks of 16; transformers would make two of 32
        ((5, 4), "cannot dequantise"),
    ],
)
def test_fp8_with_other_scales_is_rejected(scales: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**COMMON)
    build(config).save_pretrained(tmp_path / "plain")
    packed, _ = fp8(tensors(tmp_path / "plain"), 16)
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    packed.pop(name)
    if scales is not None:
        packed[name] = torch.ones(scales)
    config.quantization_config = _said(16)
    with pytest.raises(UserError, match=message):
        load(save(tmp_path / "packed", packed, config))


@pytest.mark.parametrize("block", [1, "x", [16], [16, 0], [16.0, 16], {"a": 16}])
def test_block_sizes_that_are_none_are_named(block: Any, tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**COMMON)
    build(config).save_pretrained(tmp_path / "plain")
    packed, _ = fp8(tensors(tmp_path / "plain"), 16)
    config.quantization_config = _said(16) | {"weight_block_size": block}
    with pytest.raises(UserError, match=r"config\.json.*weight_block_size"):
        load(save(tmp_path / "packed", packed, config))


def test_fp4_experts_under_the_name_of_fp8_are_rejected() -> None:
    config = transformers.Qwen3Config(**COMMON, quantization_config=_said(16) | {"expert_dtype": "fp4"})
    with pytest.raises(UserError, match=r"quantization_config.*fp8"):
        check_config(config)
