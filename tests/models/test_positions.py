"""How many positions a model takes by its configuration, and the setting that says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from apb.models import load_model
from apb.models.shape import position_limit
from burst.errors import UserError
from tests.support.tiny import llama_config, saved_llama

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "configured", "limit"),
    [
        ({"rope_type": "yarn", "original_max_position_embeddings": 512}, 512, 2048),
        ({"rope_type": "yarn", "original_max_position_embeddings": 512}, 2048, 2048),
        ({"rope_type": "yarn", "original_max_position_embeddings": 512}, 4096, 4096),
        ({"rope_type": "yarn", "original_max_position_embeddings": 512}, 640, 2048),
        ({"rope_type": "yarn"}, 512, 2048),  # transformers takes the configured number for the original one
        (LLAMA3 | {"original_max_position_embeddings": 512}, 2048, 2048),
        (LLAMA3 | {"original_max_position_embeddings": 512}, 512, 512),
        ({"rope_type": "linear"}, 512, 512),  # published with the scaled number and with the original one
        ({"rope_type": "default"}, 512, 512),
    ],
)
def test_position_limit(rope: dict[str, Any], configured: int, limit: int) -> None:
    parameters = ROPE | rope
    assert position_limit(LlamaConfig(max_position_embeddings=configured, rope_parameters=parameters)) == limit


def test_position_limit_of_what_has_no_rope() -> None:
    assert position_limit(llama_config(max_position_embeddings=77)) == 77


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 64 positions by its config.json."""
    made = Path(saved_llama(tmp_path / "m"))
    file = made / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 64}))
    return made


def test_a_setting_raises_the_limit(folder: Path) -> None:
    ids = list(range(3, 103))
    setup = Setup.make(EngineOptions(str(folder), hosts=2, strategy="ring"))
    with pytest.raises(UserError, match="max_positions"):
        setup.plan(setup.prompt(ids[:90], ids[90:], chat=False))
    with Engine.launch(str(folder), hosts=2, strategy="ring", max_positions=200) as engine:
        handle = engine.prefill(ids[:90], ids[90:], chat=False)
        with torch.inference_mode():
            model = load_model(folder, dtype="float32", device="cpu")
            want = model(torch.tensor([handle.prompt.token_ids])).logits[0, -1]
        torch.testing.assert_close(engine.logits(handle), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", 2**31])
def test_limits_that_are_none_are_refused(value: Any, folder: Path) -> None:
    with pytest.raises(UserError, match="max_positions"):
        Setup.make(EngineOptions(str(folder), hosts=1, strategy="full", max_positions=value))
