"""Sizes of models and prompts: the numbers that plans are made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from apb.layers.base import LayerKind
from apb.layers.latent import Latent
from apb.layers.softmax import Softmax
from burst.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that costs depend on. Bytes per element are those of activations. ``linear_params`` are those
    that one token multiplies with outside embedding and head, of the experts those that it visits. ``mixers``: how the
    layers mix tokens, in the model's order; a layer may have two, or none."""

    layers: int
    hidden: int
    intermediate: int  # widest MLP of a token; experts are as wide as all that are visited, together
    mixers: tuple[LayerKind, ...]
    vocab: int
    linear_params: int
    head_params: int  # the LM head
    total_params: int
    element_size: int  # bytes
    max_positions: int
    expert_row_bytes: int = 0  # of a token that lives at once in all experts it visits; 0 without experts
    rope_border: int | None = None  # longer sequences are rotated otherwise (LongRoPE); None: all alike

    @property
    def mlp_row_bytes(self) -> int:
        """Bytes of one token that live at once in the widest MLP: gate, up and product, or the visited experts'."""
        return max(3 * self.intermediate * self.element_size, self.expert_row_bytes)

    @property
    def kinds(self) -> dict[LayerKind, int]:
        """Count of mixers of each kind and size."""
        return _counted(self.mixers)

    @property
    def sharded(self) -> dict[LayerKind, int]:
        """Those whose context is sharded."""
        return {kind: count for kind, count in self.kinds.items() if kind.sharded}

    @property
    def replicated(self) -> dict[LayerKind, int]:
        """Those that every host keeps alike, exact by exchanges of their own."""
        return {kind: count for kind, count in self.kinds.items() if not kind.sharded}

    @property
    def heads(self) -> Softmax | Latent:
        """The sizes of the first sharded layer, of a window layer where there is none: those of draft heads.

        Raises UserError where no layer has queries, keys and values by head.
        """
        found = [kind for kind in self.mixers if isinstance(kind, Softmax | Latent)]
        if not found:
            raise UserError(
                "no layer of this model has queries, keys and values by head",
                given=", ".join(sorted({kind.name for kind in self.mixers})),
                allowed="models with a full, a latent or a window layer",
                remedy="Leave draft heads, retaining heads and training to other models; decode=lookup needs none.",
            )
        return next((kind for kind in found if kind.sharded), found[0])

    @property
    def rotary_dim(self) -> int:
        """The widest rotation's cos, or sin; every kind may have one of its own, made before the first layer."""
        widest = {kind.name: 0 for kind in self.kinds}
        for kind in self.kinds:
            widest[kind.name] = max(widest[kind.name], kind.rotary_dim)
        return sum(widest.values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's rows in all sharded layers, on its owner."""
        e = self.element_size
        return sum(count * kind.row_bytes(e) for kind, count in self.sharded.items() if kind.reads is None)

    @property
    def widest_row(self) -> int:
        """Bytes of one token's rows in the sharded layer where they are widest."""
        return max((kind.row_bytes(self.element_size) for kind in self.sharded), default=0)

    @property
    def partial_bytes(self) -> int:
        """Bytes of one new token's partial outputs and LSE in all sharded layers, to one peer."""
        return sum(count * kind.partial_bytes(self.element_size) for kind, count in self.sharded.items())


@lru_cache(maxsize=64)
def _counted(mixers: tuple[LayerKind, ...]) -> dict[LayerKind, int]:
    return dict(Counter(mixers))


@dataclass(frozen=True)
class PromptLengths:
    """Token counts of a prompt. ``context`` = template head + document; ``query`` = what runs in the query phase."""

    context: int  # n: prefilled over the hosts
    head: int  # s: leading context tokens before the document's own text (BOS, system prompt)
    question: int  # l_q: the question's own text, embedded in anchors; 0 when there is none
    query: int  # separator + question + template tail; 0 when there is no question
    copied: int = 0  # of the context: the question's copy behind the head, separator included; anchors then embed none
