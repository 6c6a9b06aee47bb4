"""What all tests share: one thread a process, marker skips, and two models on disk."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before torch is imported: the tests run several ranks at once, and spinning OpenMP barriers slow them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from burst.errors import UserError

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.support.command")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ``-m claims``; here because pytest reads no other conftest in time."""
    parser.addoption("--claims-out", metavar="FILE", help="JSONL file of the claims' samples; a stopped run goes on")
    parser.addoption(
        "--claims-data", action="append", default=[], metavar="FILE", help="JSONL questions that are decoded too"
    )
    parser.addoption("--claims-model", default="smollm2-135m", help="model that claims are checked on")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "ray": None if importlib.util.find_spec("ray") else "ray is not installed",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def embedded_path() -> Path:
    """The embedded model's folder in the user's own cache, fetched and converted when it is not there yet."""
    from apb.models import resolve

    try:
        return resolve("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama's folder (do not change it): 3 layers, 4 query and 2 kv heads of 16, no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
