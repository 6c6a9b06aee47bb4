"""Saved families: what their files say is loaded, or rejected before any weight is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apb.models.loading import load_model, random_model
from apb.models.shape import model_shape
from burst.errors import UserError
from tests.support.families import FAMILIES, build_family, whole_logits
from tests.support.tiny import random_ids

IDS = random_ids(20, 1, vocab=600)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5_moe", "deepseek_v3", "nemotron_h"])
def test_experts_run_in_float64(family: str, tmp_path: Path) -> None:
    made = build_family(family)
    made.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float64", device="cpu")
    assert (whole_logits(loaded, IDS) - whole_logits(made, IDS)).abs().max() < 1e-4
    values = FAMILIES[family].config().to_dict()
    drawn = random_model(values, dtype="float64", device="cpu")
    assert whole_logits(drawn, IDS).isfinite().all()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt_oss", {"sliding_window": 0}),
        ("gemma3", {"sliding_window": -1}),
        ("phi3-window", {"sliding_window": 0}),
        ("llama4", {"attention_chunk_size": 0}),
    ],
)
def test_windows_without_keys_are_rejected_by_name(family: str, change: dict[str, Any]) -> None:
    ((name, size),) = change.items()
    with pytest.raises(UserError, match=f"{name} is {size}"):
        model_shape(FAMILIES[family].config(**change), torch.float32)
