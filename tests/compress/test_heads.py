"""Files of retaining heads: the published format, ours, the shipped ones, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from apb.compress.heads import Head, RetainingHeads, find, load, save, shipped
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from apb.layers.full import Full
from apb.plan.shapes import ModelShape
from burst.errors import UserError
from tests.support.tiny import saved_llama

WIDTH, KV_HEADS = 128, 2  # of the tiny Llama
SMOLLM2 = ModelShape(30, 576, 1536, (Full(9, 3, 64, 64),) * 30, 49152, 1, 1, 1, 4, 8192)


def published(layers: int, hidden: int, infix: str = "", width: int = WIDTH) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    state = {"model.embed_tokens.weight": torch.zeros(4, 4), "model.layers.0.self_attn.q_proj.weight": torch.ones(2)}
    for i in range(layers):
        state[f"model.layers.{i}.self_attn.{infix}fc1.weight"] = torch.randn(hidden, width, generator=gen)
        state[f"model.layers.{i}.self_attn.{infix}fc2.weight"] = torch.randn(KV_HEADS, hidden, generator=gen)
    return state


@pytest.mark.parametrize("infix", ["", "retaining_head."])
@pytest.mark.parametrize("hidden", [7, 64])
def test_a_published_state_dict_is_read_with_its_own_hidden_width(tmp_path: Path, hidden: int, infix: str) -> None:
    state = published(11, hidden, infix)  # more than ten layers: 10 comes after 9, not after 1
    torch.save(state, tmp_path / "heads.pt")
    heads = load(tmp_path / "heads.pt")
    assert (len(heads.layers), heads.window, heads.keys) == (11, 5, "raw")
    for i, head in enumerate(heads.layers):
        assert head.hidden == hidden and head.kv_heads == KV_HEADS and head.bias_W is None
        assert torch.equal(head.fc1_WE, state[f"model.layers.{i}.self_attn.{infix}fc1.weight"])


@pytest.mark.parametrize("method", ["mlp", "ridge"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, method: str) -> None:
    gen = torch.Generator().manual_seed(1)
    linear = Head(torch.randn(KV_HEADS, WIDTH, generator=gen), torch.randn(KV_HEADS, generator=gen))
    network = Head(
        torch.randn(9, WIDTH, generator=gen), torch.randn(9, generator=gen), torch.randn(KV_HEADS, 9, generator=gen)
    )
    head = network if method == "mlp" else linear
    other = Head(*(None if part is None else part + 1 for part in (head.fc1_WE, head.bias_W, head.fc2_KW)))
    save(tmp_path / "h.safetensors", RetainingHeads((other, head), 3, "from_end", {"method": method}), torch.float32)
    again = load(tmp_path / "h.safetensors")
    assert (again.window, again.keys, again.about["method"]) == (3, "from_end", method)
    x = torch.randn(5, WIDTH, generator=gen)
    assert len(again.layers) == 2 and torch.equal(again.layers[1](x), head(x))
    assert again.layers[0].hidden == (9 if method == "mlp" else 0)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    for value in (1.0, 2.0):
        save(file, RetainingHeads((Head(torch.full((2, WIDTH), value)),), 1, "raw", {"method": "ridge"}))
        assert load(file).layers[0].fc1_WE[0, 0] == value


def test_a_head_may_absorb_the_scaling_of_its_input() -> None:
    gen = torch.Generator().manual_seed(2)
    head = Head(torch.randn(6, 8, generator=gen), torch.randn(6, generator=gen), torch.randn(2, 6, generator=gen))
    x, mean, deviation = torch.randn(4, 8, generator=gen), torch.randn(8, generator=gen), torch.rand(8) + 0.5
    torch.testing.assert_close(head.absorbing(mean, deviation)(x), head((x - mean) / deviation), atol=1e-4, rtol=1e-4)


def broken(tmp_path: Path, name: str) -> Path:
    file = tmp_path / name
    state = published(3, 8)
    if name == "no-fc2.pt":
        del state["model.layers.1.self_attn.fc2.weight"]
    elif name == "no-layer.pt":
        state = {key: value for key, value in state.items() if ".1." not in key}
    elif name == "uneven.pt":
        state["model.layers.1.self_attn.fc1.weight"] = torch.zeros(9, WIDTH)
    elif name == "other.pt":
        state = {"model.norm.weight": torch.zeros(3)}
    if name.endswith(".pt"):
        torch.save(state, file)
    else:
        file.write_bytes(b"no heads at all")
    return file


@pytest.mark.parametrize(
    "name, words",
    [
        ("no-fc2.pt", "layer 1 lacks fc2.weight"),
        ("no-layer.pt", "layer 1 lacks fc1.weight"),
        ("uneven.pt", "do not fit together"),
        ("other.pt", "holds no tensors named"),
        ("text.bin", "cannot be used"),
        ("text.safetensors", "too few for its header"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    file = broken(tmp_path, name)
    with pytest.raises(UserError, match=words) as refused:
        load(file)
    assert str(file) in str(refused.value)


def test_names_that_mean_no_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no retaining heads"):
        find(str(tmp_path / "nowhere.pt"))


def test_heads_of_another_model_are_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    from apb.compress import compressor

    torch.save(published(2, 8), tmp_path / "two-layers.pt")
    model = saved_llama(tmp_path / "model")
    scorer = compressor("retaining", heads=str(tmp_path / "two-layers.pt"))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="belong to another model"):
        Setup.make(EngineOptions(model, hosts=2, strategy="apb", compress=scorer))


def test_the_shipped_heads_fit_their_model() -> None:
    files = shipped()
    assert "smollm2-135m" in files
    heads = load(find("smollm2-135m"))
    heads.check(SMOLLM2)
    with pytest.raises(UserError, match="another model"):
        heads.check(dataclasses.replace(SMOLLM2, layers=29, mixers=SMOLLM2.mixers[:29]))
    assert all(file.stat().st_size < 10_000_000 for file in files.values())
    assert all(torch.isfinite(head.fc1_WE).all() for head in heads.layers)
    recall = json.loads(heads.about["held_out_recall"])
    assert recall["mlp"]["plain"] > recall["ridge"]["plain"] > recall["random"]["plain"]
