"""A sample of docs/models.md: architectures at tiny size are exact, or rejected, as the page says."""

from __future__ import annotations

import pytest

from tests.sweep.page import PAGE, kept
from tests.sweep.run import architectures
from tests.sweep.verdict import REJECTED, WRONG, judge

SAMPLE = ("llama", "qwen3_moe", "gpt_oss", "gemma3_text", "gemma4_text", "llama4_text", "deepseek_v3", "qwen3_next")
SAMPLE += ("nemotron_h", "falcon_h1", "gpt2", "bert", "mamba2", "llava")


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_model_is_exact_or_rejected_as_the_page_says(model_type: str) -> None:
    found = judge(model_type, architectures()[model_type])
    assert found.verdict != WRONG, found.words
    assert found.verdict == kept().get(model_type, found.verdict), found.words
    assert found.words or found.verdict != REJECTED


def test_the_page_has_every_architecture_and_none_wrong() -> None:
    page = kept()
    assert WRONG not in page.values() and "**0 wrong**" in PAGE.read_text()
    if page:  # made with the installed transformers
        assert set(page) == set(architectures())
