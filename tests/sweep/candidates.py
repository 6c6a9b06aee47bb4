"""Tiny models of an architecture, each beside a way to the adapter that an engine would take."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from apb.models.adapter import Adapter
from apb.models.checks import check_config
from apb.models.loading import load_config, load_model
from apb.models.shape import model_shape
from tests.support.composites import COMPOSITES, composite, composite_config, plain
from tests.support.families import FAMILIES, build_stirred, stir
from tests.support.family_base import INIT
from tests.sweep.shrink import shrunk


@dataclass(frozen=True)
class Candidate:
    """A reference model, the vocabulary of its text, and a call that adapts it, or a copy with equal weights."""

    model: Any
    vocab: int
    adapt: Callable[[], Adapter]


def candidates(model_type: str) -> list[Callable[[], Candidate]]:
    """Return the models to be judged for a type: of the families' table, of the composites', or shrunk by name."""
    made: list[Callable[[], Candidate]] = [
        partial(_text, family.config) for family in FAMILIES.values() if family.make.model_type == model_type
    ]
    made += [partial(_composite, name) for name in COMPOSITES if name.partition("-")[0] == model_type]
    return made or [partial(_text, partial(shrunk, model_type))]


def _text(make: Callable[[], Any]) -> Candidate:
    model = build_stirred(make())
    return Candidate(model, model.config.get_text_config().vocab_size, lambda: _adapted(model, make()))


def _composite(name: str) -> Candidate:
    config = composite_config(name, initializer_range=INIT)
    model = composite(config)
    stir(model)
    # Without images the composite's own forward fails in transformers 5.24.
    whole = model.language_model if isinstance(model, transformers.Llama4ForConditionalGeneration) else model
    return Candidate(whole, config.get_text_config().vocab_size, lambda: _from_folder(model))


def _from_folder(model: PreTrainedModel) -> Adapter:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder)
        loaded = load_model(path, dtype="float32", device="cpu")
        return _adapted(plain(loaded), load_config(path))


def _adapted(model: PreTrainedModel, config: Any) -> Adapter:
    """Return the model behind an adapter, checked in the order in which an engine is set up."""
    check_config(config)
    return Adapter(model, model_shape(config, torch.float32))
