"""Saved families, loaded in types that transformers' defaults do not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from apb.models.loading import load_model, random_model
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
