"""Sizes of models and prompts: the numbers that plans are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that costs depend on. Bytes per element are those of activations. ``linear_params`` are those
    that one token multiplies with outside embedding and head, of the experts those that it visits."""

    layers: int
    hidden: int
    intermediate: int  # widest MLP of a token; experts are as wide as all that are visited, together
    q_heads: int
    kv_heads: int
    head_dim: int
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
    def kv_row_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.element_size

    @property
    def partial_row_bytes(self) -> int:
        """Bytes of one token's partial attention output and LSE (fp32; fp64 for fp64 models) in one layer."""
        return self.q_heads * (self.head_dim * self.element_size + max(4, self.element_size))


@dataclass(frozen=True)
class PromptLengths:
    """Token counts of a prompt. ``context`` = template head + document; ``query`` = what runs in the query phase."""

    context: int  # n: prefilled over the hosts
    head: int  # s: leading context tokens before the document's own text (BOS, system prompt)
    question: int  # l_q: the question's own text, embedded in anchors; 0 when there is none
    query: int  # separator + question + template tail; 0 when there is no question
    copied: int = 0  # of the context: the question's copy behind the head, separator included; anchors then embed none
