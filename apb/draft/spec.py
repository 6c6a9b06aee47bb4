"""Which draft head an engine has, said before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apb.draft.base import DraftHead, LayerShape, Target
from apb.draft.files import configuration, find, load, shipped
from apb.draft.handoff import Handoff
from apb.plan import ModelShape
from burst.errors import UserError


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

    ``window``: tokens before the last one that it sees beside its sinks; None: the whole context; auto: the head's own.
    ``vocab``: how many of the most frequent ids it drafts from; None is all. ``adaptive``: ids of the prompt take the
    places of the least frequent ones. Raises UserError out of range.
    """

    head: str
    window: int | Literal["auto"] | None = "auto"
    vocab: int | None = None
    adaptive: bool = False

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("vocab", self.vocab)):
            if value not in (None, "auto") and (not isinstance(value, int) or value < 1):
                raise UserError(
                    f"decode.{name} is out of range",
                    given=value,
                    allowed="a whole number, 1 or more, or null",
                    remedy=f"Change decode.{name}.",
                )

    def handoff(self, shape: ModelShape) -> Handoff:
        """Return what hosts hand over to the one that drafts; raises UserError for a head that cannot be read."""
        config = configuration(find(self.head))
        try:
            layer = LayerShape.of(config)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"the draft head {self.head} cannot be used: its configuration lacks or misstates {error}",
                given=self.head,
                allowed="a head with Llama's configuration keys",
                remedy="Copy it again, or choose another head.",
            ) from error
        return Handoff(
            window=config["draft_window"] if self.window == "auto" else self.window,
            sinks=config["draft_sinks"],
            kv_heads=layer.num_key_value_heads,
            head_dim=layer.head_dim,
            element_size=shape.element_size,
            bitmap_bytes=-(-shape.vocab // 8) if self.adaptive else 0,
        )

    def load(self, target: Target) -> DraftHead:
        """Return the head, ready to draft for ``target``; raises UserError for one that does not fit."""
        head = load(self.head, target)
        if self.window != "auto":
            head.window = self.window
        return head
