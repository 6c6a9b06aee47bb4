"""The processes that torchrun started: rank 0 runs the program and commands, the others follow."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import threading
import time
from dataclasses import dataclass

from launch.torchrun.follower import Follower
from launch.torchrun.leader import Leader
from launch.torchrun.place import Place, find_place

SLICE_S = 1.0  # between two looks at the parent


@dataclass
class Ranks:
    """This process among torchrun's: ``leader`` on rank 0, ``follower`` on the others."""

    place: Place
    leader: Leader | None
    follower: Follower | None
    taken: bool = False  # whether a cluster stands on the ranks


@functools.cache
def ranks() -> Ranks:
    """Return this process's place among torchrun's.

    Raises UserError when torchrun did not start it, when the processes cannot meet, or without a key in common.
    """
    place = find_place()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # otherwise the parent is a shell, which may well end first
        threading.Thread(target=_end_after_parent, args=(os.getppid(),), daemon=True).start()
    if place.rank:
        return Ranks(place, None, Follower(place))
    leader = Leader(place)
    atexit.register(leader.stop)
    return Ranks(place, leader, None)


def _end_after_parent(parent: int) -> None:
    """End this process soon after torchrun, which ends its processes itself unless it is killed."""
    while os.getppid() == parent:
        time.sleep(SLICE_S)
    os.kill(os.getpid(), signal.SIGTERM)
