"""YaRN by a factor for the prompt: the smallest that has room, the model that transformers makes of it, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from apb.engine.engine import Engine
from apb.engine.setup import Setup
from apb.models.yarn import with_yarn
from burst.errors import UserError
from tests.support.tiny import build, byte_tokenizer, make_prompt

LIMIT = 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}


def config(**changes: Any) -> transformers.Qwen3Config:
    return transformers.Qwen3Config(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 96,
            "vocab_size": 2400,
            "max_position_embeddings": LIMIT,
            "initializer_range": 0.25,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yarn")
    build(config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stretched(factor: int) -> transformers.Qwen3Config:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": float(factor)}
    return config(
        max_position_embeddings=LIMIT * factor,
        rope_parameters=rope | {"original_max_position_embeddings": LIMIT},
    )


@pytest.mark.parametrize(("context", "factor"), [(40, 1), (LIMIT - 11 - 8, 1), (LIMIT - 11 - 7, 2), (150, 3)])
def test_the_smallest_factor_that_has_room_is_taken(folder: Path, context: int, factor: int) -> None:
    prompt = make_prompt(context)
    setup = Setup.make(str(folder), hosts=2, strategy="ring", yarn="auto").covering(len(prompt.token_ids) + 8)
    assert (setup.spec.yarn, setup.shape.max_positions) == (factor, factor * LIMIT)
    twin = build(config() if factor == 1 else stretched(factor))
    with Engine.launch(setup) as engine:
        handle = engine.prefill(prompt, max_new_tokens=8)
        with torch.no_grad():
            wanted = twin(input_ids=torch.tensor([prompt.token_ids]), use_cache=False).logits[0, -1]
        assert torch.allclose(engine.logits(handle), wanted, atol=1e-4)
        with pytest.raises(UserError, match="longer than the model's context") as caught:
            engine.prefill(make_prompt(factor * LIMIT - 10))
        assert "start another engine" in caught.value.remedy


def test_what_no_factor_reaches_is_too_long(folder: Path) -> None:
    setup = Setup.make(str(folder), yarn="auto").covering(10**9)
    with pytest.raises(UserError, match="longer than the model's context"):
        setup.check_room(10**9, 1)


def test_a_number_is_a_factor(folder: Path) -> None:
    with Engine.launch(str(folder), hosts=2, strategy="ring", yarn=2) as engine:
        assert engine.setup.shape.max_positions == 2 * LIMIT
        prompt = make_prompt(100)
        with torch.no_grad():
            twin = build(stretched(2))
            wanted = twin(input_ids=torch.tensor([prompt.token_ids]), use_cache=False).logits[0, -1]
        assert torch.allclose(engine.logits(engine.prefill(prompt)), wanted, atol=1e-4)


def test_auto_needs_the_prompt_first(folder: Path) -> None:
    with pytest.raises(UserError, match="yarn=auto needs the prompt"):
        Engine.launch(str(folder), yarn="auto")
    with pytest.raises(UserError, match="yarn=auto needs the prompt"):
        Engine.launch(Setup.make(str(folder), yarn="auto"))


def test_random_weights_are_stretched(folder: Path) -> None:
    values = config().to_dict()
    setup = Setup.make("shape", config=values, hosts=1, strategy="full", yarn="auto").covering(3 * LIMIT)
    with Engine.launch(setup) as engine:
        assert engine.logits(engine.prefill(make_prompt(2 * LIMIT))).isfinite().all()


@pytest.mark.parametrize("value", [0, -1, 65, 1.5, "most", True])
def test_wrong_factors_are_rejected(folder: Path, value: Any) -> None:
    with pytest.raises(UserError, match="yarn"):
        Setup.make(str(folder), yarn=value)


@pytest.mark.parametrize(
    "made",
    [
        lambda: config(rope_parameters=YARN),
        lambda: config(rope_parameters=YARN | {"rope_type": "linear"}),
        transformers.Gemma3TextConfig,
        transformers.Olmo3Config,
        lambda: transformers.GraniteMoeHybridConfig(position_embedding_type=None),
    ],
)
def test_models_without_plain_rope_are_not_stretched(made: Any) -> None:
    with pytest.raises(UserError, match="plain RoPE only"):
        with_yarn(made(), 2)


def test_a_configuration_is_not_changed() -> None:
    given = config()
    before = copy.deepcopy(given.to_dict())
    assert with_yarn(given, 4).max_position_embeddings == 4 * LIMIT
    assert given.to_dict() == before
    assert with_yarn(given, 1) is given
