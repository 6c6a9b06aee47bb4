"""Specification of an engine's draft head, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from apb.draft.base import DraftHead, LayerShape, Target
from apb.draft.draft import Draft
from apb.draft.files import configuration, find, footprint, load, ranks, shipped
from apb.draft.vocab import bitmap, check
from apb.draft.vocab import load as load_ranks
from apb.plan.draft import Handoff
from apb.plan.shapes import ModelShape
from burst.errors import UserError, in_range
from burst.registry import option


def own_head(model: str) -> str:
    """Return the name of the head that is shipped for a model; raises UserError when there is none."""
    if model in shipped():
        return model
    raise UserError(
        f"no draft head is shipped for the model '{model}'",
        given="decode.head=null",
        allowed=f"a model of {', '.join(shipped()) or 'none'}, or a head of your own",
        remedy="Set decode.head to a folder or file with the model's head, train one (apb train eagle), or use "
        "decode=lookup, which needs none.",
    )


@dataclass(frozen=True)
class DraftSpec:
    """A draft head by name or path, what it sees, and what it drafts from.

    Raises UserError out of range.
    """

    head: str
    vocab: int | Literal["auto"] | None = option(
        "auto",
        "ids to draft from, most frequent first; null: all; auto: a quarter of the model's, where ranks are known",
    )
    frequency: str | None = option(
        None,
        "ranked ids, a published freq_V.pt or safetensors; null: those shipped with the head",
        text=True,
    )
    adaptive: bool = option(True, "ids of the prompt take the places of the least frequent ones")
    window: int | Literal["auto"] | None = option(
        "auto", "tokens that drafting looks back, beside the first few; null: the whole context; auto: the head's own"
    )

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("vocab", self.vocab)):
            fine = value in (None, "auto") or (isinstance(value, int) and value >= 1)
            in_range(f"decode.{name}", value, fine, "a whole number, 1 or more, auto, or null")

    def handoff(self, shape: ModelShape, stop_ids: Sequence[int]) -> Handoff:
        """Return what hosts hand over to the one that drafts; raises UserError for files that cannot be used."""
        path = find(self.head)
        config, (weights, feature_size) = configuration(path), footprint(path)
        try:
            layer = LayerShape.of(config)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"the draft head {self.head} cannot be used: its configuration lacks or misstates {error}",
                given=self.head,
                allowed="a head with Llama's configuration keys",
                remedy="Copy it again, or choose another head.",
            ) from error
        ids_V = self._ids(shape.vocab, stop_ids)
        rows = len(ids_V) * shape.hidden * shape.element_size if ids_V is not None else 0
        adapts = self.adaptive and ids_V is not None
        return Handoff(
            window=config["draft_window"] if self.window == "auto" else self.window,
            sinks=config["draft_sinks"],
            kv_heads=layer.num_key_value_heads,
            head_dim=layer.head_dim,
            element_size=shape.element_size,
            bitmap_bytes=-(-shape.vocab // 8) if adapts else 0,
            feature_size=feature_size,
            weight_bytes=weights * shape.element_size + rows,
            adapted_bytes=rows if adapts else 0,
        )

    def load(self, target: Target, stop_ids: tuple[int, ...]) -> Draft:
        """Return the head, ready to draft for ``target``; raises UserError for one that does not fit."""
        head = load(self.head, target)
        if self.window != "auto":
            head.window = self.window
        vocab = target.shape.vocab
        ids_V = self._ids(vocab, stop_ids)
        if ids_V is None:
            return Draft(head)
        if len(head.ids_V) < vocab:  # an EAGLE-3 head has rows for some ids only
            return self._of_own(head, len(ids_V), stop_ids)
        return Draft(
            head.with_vocab(ids_V), self._ranked(target.shape.vocab, stop_ids) if self.adaptive else None, stop_ids
        )

    def _of_own(self, head: DraftHead, size: int, stop_ids: Sequence[int]) -> Draft:
        """Return a head that drafts from its own most frequent ids, ``size`` or, where it has fewer, all of them."""
        vocab, own = head.target.shape.vocab, head.ids_V.cpu()
        ranked_W = self._ranked(vocab, stop_ids)
        ranked_W = ranked_W[torch.isin(ranked_W, own)]
        stops = tuple(i for i in stop_ids if bool((own == i).any()))
        if not len(ranked_W):
            raise UserError(
                "none of the ranked ids can be drafted by this head",
                given=f"{len(own)} ids of the head's own",
                allowed="ranked ids of this head's model, or decode.vocab=null",
                remedy="Set decode.vocab=null: the head has its own frequent ids.",
            )
        made = head.with_vocab(ranked_W[:size])
        return Draft(made, ranked_W if self.adaptive else None, stops, bitmap(own, vocab))

    def _ids(self, vocab: int, stop_ids: Sequence[int]) -> Tensor | None:
        """Return the ids to draft from (V,); None for all."""
        if self.vocab is None or (self.vocab == "auto" and self._file() is None):
            return None
        ranked_W = self._ranked(vocab, stop_ids)
        size = vocab // 4 if self.vocab == "auto" else self.vocab
        if size > len(ranked_W):
            raise UserError(
                "there are fewer ranked ids than should be drafted from",
                given=f"decode.vocab={size}",
                allowed=f"up to {len(ranked_W)}, or null for all ids",
                remedy="Lower decode.vocab, or rank more ids (apb train frequency).",
            )
        return check(ranked_W[:size], vocab, stop_ids, f"cut to {size} ids")

    def _ranked(self, vocab: int, stop_ids: Sequence[int]) -> Tensor:
        file = self._file()
        if file is None:
            raise UserError(
                "no frequencies are known for this draft head",
                given=f"decode.vocab={self.vocab}",
                allowed="decode.vocab=null, or a file of ranked ids in decode.frequency",
                remedy="Make one: apb train frequency model=...",
            )
        return load_ranks(file, vocab, stop_ids)

    def _file(self) -> Path | None:
        if self.frequency is not None:
            return Path(self.frequency).expanduser()
        return ranks(find(self.head))
