"""RoPE by length (LongRoPE): one length for all hosts, on both sides of the border, and no crossing of it."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from apb.models import lengths
from apb.models.adapter import Adapter
from apb.models.lengths import agreed
from apb.prompt.prompt import Question
from apb.strategies import strategy
from burst.errors import UserError
from tests.support.tiny import TinyEngine, adapt, make_prompt, random_ids, tiny_engine

BORDER, ANSWER = 96, 8


def config(**changes: Any) -> transformers.Phi3Config:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
    return transformers.Phi3Config(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": 2400,
            "pad_token_id": None,
            "sliding_window": None,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": BORDER,
            "initializer_range": 0.25,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": BORDER,
                **factors,
            },
            **changes,
        }
    )


@functools.cache
def phi3(window: int | None = None) -> Adapter:
    return adapt(config(sliding_window=window))


def whole(ids: tuple[int, ...], at: int = -1, window: int | None = None) -> Tensor:
    """Return the logits after one token of transformers' whole run, by its own attention and frequencies."""
    model: Any = phi3(window)._model
    ours = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, at]
        return logits
    finally:
        model.set_attn_implementation(ours)


def engine(name: str, hosts: int, chunk: int | None = None) -> TinyEngine:
    made = tiny_engine(phi3(), strategy(name), hosts)
    if chunk is not None:
        made.setup.__dict__["chunk_tokens"] = chunk
    return made


def greedy(ids: tuple[int, ...], count: int) -> list[int]:
    """Return the tokens of whole runs."""
    out = list(ids)
    for _ in range(count):
        out.append(int(whole(tuple(out)).argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("context", [60, BORDER - 11, BORDER - 10, 150])
@pytest.mark.parametrize(("name", "hosts"), [("full", 1), ("ring", 2), ("ring", 3), ("burst", 3)])
def test_hosts_rotate_as_one_whole_run(name: str, hosts: int, context: int) -> None:
    prompt = make_prompt(context)  # 11 tokens of question behind it
    with engine(name, hosts) as e:
        handle = e.prefill(prompt)
        assert torch.allclose(e.logits(handle), whole(prompt.token_ids), atol=1e-4)
        assert handle.rope_length == len(prompt.token_ids) == context + 11


@pytest.mark.parametrize("context", [60, 150])
def test_windows_keep_the_length(context: int) -> None:
    prompt = make_prompt(context)
    with tiny_engine(phi3(24), strategy("ring"), 3) as e:
        handle = e.prefill(prompt)
        assert torch.allclose(e.logits(handle), whole(prompt.token_ids, window=24), atol=1e-4)
        assert not torch.allclose(e.logits(handle), whole(prompt.token_ids), atol=1e-1)


@pytest.mark.parametrize("context", [60, 150])
def test_answers_are_those_of_whole_runs(context: int) -> None:
    prompt = make_prompt(context)
    wanted = greedy(prompt.token_ids, ANSWER)
    with engine("ring", 3) as e:
        handle = e.prefill(prompt, max_new_tokens=ANSWER)
        copied = handle.fork()
        assert list(e.generate(handle, ANSWER).token_ids) == wanted
        gathered = copied.gather(1)
        assert list(e.generate(gathered, ANSWER, decode="lookup").token_ids) == wanted


def test_a_second_question_and_scores_keep_the_length() -> None:
    prompt, other = make_prompt(150), Question(random_ids(2, 7), random_ids(4, 8), random_ids(1, 9), None)
    with engine("ring", 3) as e:
        handle = e.prefill(prompt)
        second = handle.fork(other)
        assert torch.allclose(e.logits(second), whole(second.prompt.token_ids), atol=1e-4)
        given = random_ids(3, 5)
        wanted = [float(whole(prompt.token_ids + given[:i]).log_softmax(-1)[given[i]]) for i in range(3)]
        assert e.score(handle, given).log_probs.tolist() == pytest.approx(wanted, abs=1e-4)


def test_chunks_keep_the_length() -> None:
    prompt = make_prompt(150)
    with engine("ring", 2, chunk=16) as e:
        assert torch.allclose(e.logits(e.prefill(prompt)), whole(prompt.token_ids), atol=1e-4)


def test_crossing_the_border_is_rejected() -> None:
    prompt = make_prompt(BORDER - 15)  # 92 tokens
    with engine("ring", 2) as e:
        handle = e.prefill(prompt)
        assert len(e.generate(handle.fork(), 4).token_ids) == 4
        with pytest.raises(UserError, match=r"cannot grow so long.*92 tokens \+ 5 new tokens") as caught:
            e.generate(handle, 5)
        assert "Prefill again for 97 tokens" in caught.value.remedy
        long = Question(random_ids(4, 1), random_ids(20, 2), (), None)
        with pytest.raises(UserError, match="cannot grow so long"):
            handle.fork(long)
        with pytest.raises(UserError, match="cannot grow so long"):
            e.score(handle, random_ids(5, 3))
        room = e.prefill(prompt, max_new_tokens=5)
        assert room.rope_length == 97
        assert len(e.generate(room, 5).token_ids) == 5


def test_prompt_and_answer_are_rotated_for_both_together() -> None:
    prompt = make_prompt(BORDER - 15)
    with engine("ring", 2) as e:
        short, long = e.prefill(prompt), e.prefill(prompt, max_new_tokens=5)
        assert torch.allclose(e.logits(short), whole(prompt.token_ids), atol=1e-4)
        beyond = whole(prompt.token_ids + random_ids(5, 3), at=len(prompt.token_ids) - 1)  # a run that is longer
        assert torch.allclose(e.logits(long), beyond, atol=1e-4)
        assert not torch.allclose(e.logits(long), e.logits(short), atol=1e-1)


def test_without_agreement_hosts_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: each host by its own positions, as transformers does."""
    prompt = make_prompt(120)  # one host of three has positions 40 to 80 alone
    with engine("ring", 3) as e:
        monkeypatch.setattr(lengths, "agreed_length", lambda: None)
        assert not torch.allclose(e.logits(e.prefill(prompt)), whole(prompt.token_ids), atol=1e-1)
        monkeypatch.undo()
        assert torch.allclose(e.logits(e.prefill(prompt)), whole(prompt.token_ids), atol=1e-4)


def test_threads_with_both_lengths_share_a_model() -> None:
    rotary, x = phi3()._base.rotary_emb, torch.zeros(1, 1, 1, 16)
    at = torch.arange(40)[None]

    def cos(length: int | None) -> Tensor:
        with agreed(length):
            found: Tensor = rotary(x, at)[0]
            return found

    short, long = cos(BORDER), cos(BORDER + 1)
    assert torch.equal(cos(None), short)
    assert not torch.allclose(short, long)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(cos, [BORDER, BORDER + 1] * 50))
    assert all(torch.equal(x, (short, long)[i % 2]) for i, x in enumerate(found))


def test_other_frequencies_by_length_stay_rejected() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(UserError, match="rope_type=dynamic"):
        adapt(transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope))
