"""Messages between rank 0 and the other ranks, and the codec that they travel by."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from apb.clusters.codec import Codec, reachable
from apb.clusters.outcome import Outcome
from apb.host.messages import HostSpec


@dataclass(frozen=True)
class Start:
    """Join process group number ``group``, which meets at ``port``, unless that is done, and load the model."""

    spec: HostSpec
    nodes: tuple[int, ...]
    group: int
    port: int


@dataclass(frozen=True)
class Call:
    """Run a method of the host."""

    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Drop:
    """Forget the host and its model."""


Command = Start | Call | Drop


@dataclass(frozen=True)
class Do:
    """Rank 0 to another: carry out a command, the ``number``-th of the run."""

    number: int
    command: Command


@dataclass(frozen=True)
class Stop:
    """Rank 0 to another: end the process; ``failed``: whether the run did."""

    failed: bool


@dataclass(frozen=True)
class Ping:
    """Rank 0 to another: still here; after ``timeout_s`` without a word it is not."""

    timeout_s: float


@dataclass(frozen=True)
class Hello:
    """A rank's first word: the torchrun that started it, and its process."""

    node: int
    pid: int


@dataclass(frozen=True)
class Beat:
    """A rank to rank 0: alive; its work has stood still for so long."""

    idle_s: float


@dataclass(frozen=True)
class Done:
    """A rank to rank 0: what command ``number`` came to."""

    number: int
    outcome: Outcome


@functools.cache
def codec() -> Codec:
    """Return the codec of all that travels."""
    from apb.compress.base import COMPRESSORS
    from apb.decode.base import DECODERS, DecodeRequest
    from apb.decode.placement import Links
    from apb.decode.score import Score
    from apb.host.messages import HostReport, PrefillRequest
    from apb.layers.base import LAYERS
    from apb.plan.draft import Handoff
    from apb.plan.exact import Spread

    asked, answered = (Start, Call, Drop, PrefillRequest, Handoff, Spread, DecodeRequest), (HostReport, Links, Score)
    said = (Do, Stop, Ping, Hello, Beat, Done)
    return Codec(reachable((*asked, *answered, *said)), (COMPRESSORS, DECODERS, LAYERS))
