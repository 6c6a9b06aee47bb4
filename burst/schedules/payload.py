"""Tensors of one block of a role, which are one message, and the bytes of its rows.

Roles travel between ranks or stay in a rank's slots. ``kv``, ``q`` and ``qd`` are inputs: keys and values, queries, and
the traveller of a Q-pass backward (queries, dO, and the two numbers a row that its backward needs). ``part`` is the
result of pass-Q: a partial output with its lse. ``out`` has the output of the rank's own queries; its lse does not
travel. ``dq`` and ``dkv`` are gradients. ``qkv`` and ``dout`` go to head groups, ``out`` and ``dqkv`` come back.

Keys and values may travel in a narrower form than attention sees them in: ``carried`` are their widths on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["kv", "q", "qd", "part", "out", "dq", "dkv", "qkv", "dout", "dqkv"]
Dim = Literal["head", "value", "key row", "value row", None]  # the last dim of a tensor; the rows are those carried


class Part(NamedTuple):
    """One tensor of a block: (batch, heads, rows, dim), without a dim for states (None).

    ``kind`` is its type: ``element`` that of the inputs, ``gradient`` that of gradients on their way, ``state`` that
    of lse and delta, ``partial`` that of partial outputs and of gradients on their way back from head groups.
    """

    name: str
    heads: Literal["q", "kv"]
    dim: Dim
    kind: Literal["element", "gradient", "state", "partial"]


_Q = Part("q", "q", "head", "element")
_K, _V = Part("k", "kv", "key row", "element"), Part("v", "kv", "value row", "element")
_LSE, _DELTA = Part("lse", "q", None, "state"), Part("delta", "q", None, "state")
_OUT, _DOUT = Part("out", "q", "value", "element"), Part("dout", "q", "value", "element")
_DQ, _DK, _DV = (_Q._replace(name="dq"), _K._replace(name="dk"), _V._replace(name="dv"))

# In the message's order: the widest type first, so that all tensors are aligned.
PAYLOAD: dict[Role, tuple[Part, ...]] = {
    "kv": (_K, _V),
    "q": (_Q,),
    "qd": (_LSE, _DELTA, _Q, _DOUT),
    "part": (_LSE, _OUT._replace(kind="partial")),
    "out": (_OUT,),
    "dq": (_DQ._replace(kind="gradient"),),
    "dkv": (_DK._replace(kind="gradient"), _DV._replace(kind="gradient")),
    "qkv": (_Q, _K, _V),
    "dout": (_DOUT,),
    "dqkv": tuple(part._replace(kind="partial") for part in (_DQ, _DK, _DV)),
}


def widths(head_dim: int, value_dim: int, carried: tuple[int, int] | None) -> dict[Dim, tuple[int, ...]]:
    """Return the shape of each kind of last dim; ``carried``: widths of keys and values where others travel."""
    key, value = carried or (head_dim, value_dim)
    return {"head": (head_dim,), "value": (value_dim,), "key row": (key,), "value row": (value,), None: ()}


class Heads(NamedTuple):
    """The heads that one member of a head group works on, in the caller's order; both ranges may be empty.

    ``q_count`` is a whole multiple of ``kv_count``, grouped as kernels expect. Members may share a kv head.
    """

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def q_count(self) -> int:
        """Query heads."""
        return self.q_stop - self.q_start

    @property
    def kv_count(self) -> int:
        """Key and value heads."""
        return self.kv_stop - self.kv_start


@dataclass(frozen=True)
class AttentionShape:
    """Sizes that bytes and FLOPs depend on besides the layout; types in bytes an element."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int = 1
    element_size: int = 2  # activations (e)
    grad_size: int = 4  # gradients on the wire (eg)
    state_size: int = 4  # L and D: fp32; 8 for fp64
    partial_size: int = 2  # partial outputs of pass-Q and dqkv on the wire; 4 in the accurate mode
    carried: tuple[int, int] | None = None  # widths of k and v on their way, where attention sees others

    @property
    def row_widths(self) -> tuple[int, int]:
        """Numbers of one head's key and value as they travel."""
        return self.carried or (self.head_dim, self.value_dim)

    def row_bytes(self, role: Role, heads: Heads | None = None) -> int:
        """Bytes of one token of a role, for the given heads (all when None)."""
        size = {
            "element": self.element_size,
            "gradient": self.grad_size,
            "state": self.state_size,
            "partial": self.partial_size,
        }
        n_q, n_kv = (self.q_heads, self.kv_heads) if heads is None else (heads.q_count, heads.kv_count)
        dims, parts = widths(self.head_dim, self.value_dim, self.carried), PAYLOAD[role]
        each = ((n_q if p.heads == "q" else n_kv) * math.prod(dims[p.dim]) * size[p.kind] for p in parts)
        return self.batch * sum(each)
