"""What stands round the decoder: scales of embeddings and logits, the head's bias, the soft cap, learnt when loaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from apb.draft.eagle import EagleHead
from apb.layers.call import Call, plain
from apb.models.adapter import Adapter
from apb.models.ends import Ends
from apb.models.shape import model_shape
from apb.train.unroll import Divergence
from burst.errors import UserError
from tests.models.test_adapter import COMMON
from tests.support.tiny import adapt, build

FULL = {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None, "head_dim": 12}
KINDS: dict[str, tuple[Callable[[], Any], Ends]] = {
    "llama": (lambda: transformers.LlamaConfig(**COMMON), Ends()),
    "llama, tied": (lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True), Ends()),
    "granite": (
        lambda: transformers.GraniteConfig(**COMMON, logits_scaling=8.0, embedding_multiplier=12.0),
        Ends(12.0, 0.125),
    ),
    "cohere": (lambda: transformers.CohereConfig(**COMMON, logit_scale=0.0625), Ends(1.0, 0.0625)),
    "hyperclovax": (lambda: transformers.HyperCLOVAXConfig(**COMMON, logits_scaling=0.125), Ends(1.0, 0.125)),
    "gemma": (lambda: transformers.GemmaConfig(**COMMON, head_dim=12), Ends(48**0.5)),
    "gemma2": (lambda: transformers.Gemma2Config(**COMMON, **FULL), Ends(48**0.5, 1.0, 30.0)),
    "vaultgemma": (lambda: transformers.VaultGemmaConfig(**COMMON, **FULL), Ends(48**0.5, 1.0, 30.0)),
    "nanochat": (lambda: transformers.NanoChatConfig(**COMMON), Ends(None, 1.0, 15.0)),
    "phi": (lambda: transformers.PhiConfig(**COMMON), Ends()),
    "phimoe": (
        lambda: transformers.PhimoeConfig(**COMMON, num_local_experts=2, sliding_window=None, lm_head_bias=True),
        Ends(),
    ),
}


def made(name: str, dtype: torch.dtype) -> Adapter:
    """Return the random model of a kind; biases of heads, which start at zero, are random as well."""
    config = KINDS[name][0]()
    model = build(config, torch.float32)
    model.set_experts_implementation("eager")  # the others know no float64
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias, generator=torch.Generator().manual_seed(3))
    return Adapter(model.to(dtype), model_shape(copy.deepcopy(config), dtype))


class Whole:
    """Causal attention over the tokens that are run."""

    needs_projections = False

    def __call__(self, call: Call) -> Tensor:
        q, k, v, scale = plain(call)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2)


IDS, AT = torch.arange(5, 40), torch.arange(35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_ends_are_learnt(name: str, dtype: torch.dtype) -> None:
    adapter, wanted = made(name, dtype), KINDS[name][1]
    for found, value in zip(dataclasses.astuple(adapter.ends), dataclasses.astuple(wanted), strict=True):
        # In low precision a model that makes its scale itself rounds it.
        near = 1e-6 if dtype.itemsize > 2 else 1e-2
        assert found == value or abs(found - value) <= near * abs(value)


@pytest.mark.parametrize("name", KINDS)
def test_the_head_gives_the_models_own_logits(name: str) -> None:
    adapter = made(name, torch.float64)
    with torch.inference_mode():
        whole = adapter.all_logits(IDS, AT, Whole())
        hidden = adapter.hidden(IDS, AT, Whole())
        torch.testing.assert_close(adapter.head(hidden), whole, atol=1e-12, rtol=1e-9)
        if adapter.ends.embedding_scale is None:
            with pytest.raises(UserError, match="before its first layer"):
                adapter.draft_target()
            return
        target = adapter.draft_target()
        draft = EagleHead.fresh(target, window=None, sinks=0).double()
        torch.testing.assert_close(draft.logits(hidden[None])[0], whole, atol=1e-12, rtol=1e-9)
        few = draft.with_vocab(torch.tensor([7, 3, 250]))
        torch.testing.assert_close(few.logits(hidden[None])[0], whole[:, [7, 3, 250]], atol=1e-12, rtol=1e-9)
        with adapter.capturing((0,)) as features:
            adapter.run(IDS, AT, Whole())
        torch.testing.assert_close(draft.embed(IDS), features.value_SF, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_learnt_is_refused_where_it_is_needed() -> None:
    config = transformers.LlamaConfig(**COMMON)
    model = build(config)
    head = model.get_output_embeddings()
    own = head.forward
    model.forward = doubled_every_other(model.forward)
    adapter = Adapter(model, model_shape(copy.deepcopy(config), torch.float32))
    assert adapter.ends.logit_scale is None and head.forward == own
    for call in (lambda: adapter.head(torch.zeros(1, 48)), adapter.draft_target):
        with pytest.raises(UserError, match="after its LM head"):
            call()


def doubled_every_other(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward whose logits have a scale of their own every other token id."""

    def run(**given: Any) -> Any:
        out = forward(**given)
        out.logits = out.logits * (1 + torch.arange(out.logits.shape[-1]) % 2)
        return out

    return run


def test_the_decoder_is_its_own_after_the_probe() -> None:
    adapter = adapt(transformers.LlamaConfig(**COMMON))
    assert "forward" not in vars(adapter._model.base_model)


@pytest.mark.parametrize(("scale", "cap", "biased"), [(0.5, None, True), (1.0, 3.0, False), (0.5, 3.0, True)])
def test_divergence_with_bias_and_cap(scale: float, cap: float | None, biased: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    rows, out, feature = (torch.randn(n, 8, generator=rng) for n in (40, 300, 300))
    bias = torch.randn(40, generator=rng) if biased else None
    out.requires_grad_()
    loss = Divergence.apply(out, feature, rows, bias, scale, cap)
    (loss * torch.arange(300)).sum().backward()
    got, out.grad = out.grad, None

    def logs(x: Tensor) -> Tensor:
        z = torch.nn.functional.linear(x, rows, bias) * scale
        return (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)

    p, q = logs(feature), logs(out)
    expected = (p.exp() * (p - q)).sum(-1)
    (expected * torch.arange(300)).sum().backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got, out.grad, atol=1e-3, rtol=1e-4)
