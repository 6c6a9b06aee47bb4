"""A process's place among torchrun's, as the environment tells it, and the store through which they find each other."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from burst.errors import UserError
from launch.hosts.meeting import LOOPBACK

MEET_S = 300.0  # all processes must have come up by then


@dataclass(frozen=True)
class Place:
    """``local``: whether one torchrun started all of them; ``address`` is where rank 0 can be reached."""

    rank: int
    world: int
    local_rank: int
    node: int  # which torchrun started it
    local: bool
    address: str
    run: str  # differs from run to run on a machine
    store: dist.Store  # type: ignore[name-defined]  # anyone may reach it: nothing in it is believed


def find_place() -> Place:
    """Return this process's place; raises UserError when torchrun did not start it.

    Also for an address at which the processes cannot meet, such as a busy port.
    """
    env = os.environ
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
        raise UserError(
            "cluster 'torchrun' runs in processes that torchrun starts",
            given="cluster=torchrun in a process that torchrun did not start",
            allowed="torchrun, or cluster=ray or cluster=virtual, which start their hosts themselves",
            remedy="Run: torchrun --standalone --nproc-per-node=4 -m launch.torchrun ask -d FILE -q QUESTION",
        )
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    local = world in (1, int(env.get("LOCAL_WORLD_SIZE", "0")))
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    master, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    try:
        store = _store(rank, local, master, port)
    except (OSError, ValueError, OverflowError, dist.DistError) as error:
        raise UserError(
            f"the processes cannot meet: {str(error).splitlines()[0]}",
            given=f"MASTER_ADDR={master}, MASTER_PORT={port}",
            allowed="rank 0's machine, and a port of it that is free and that all processes reach",
            remedy="Choose another port (torchrun --master-port), or run torchrun with --standalone.",
        ) from error
    return Place(
        rank=rank,
        world=world,
        local_rank=int(env.get("LOCAL_RANK", "0")),
        node=int(env.get("GROUP_RANK", "0")),
        local=local,
        address=LOOPBACK if local else master,
        run=" ".join((env.get("TORCHELASTIC_RUN_ID", ""), master, str(port), restart)),
        store=PrefixStore(f"apb/{restart}", store),  # a restarted program finds the store of the earlier one
    )


def _store(rank: int, local: bool, master: str, port: int) -> TCPStore:
    """Join torchrun's store; where it keeps none, rank 0 opens one, on loopback if all are on its machine."""
    deadline = timedelta(seconds=MEET_S)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return TCPStore(master, port, timeout=deadline)
    if not local:
        return TCPStore(master, port, is_master=rank == 0, timeout=deadline, wait_for_workers=False)
    if rank:
        return TCPStore(LOOPBACK, port, timeout=deadline)
    listener = socket.create_server((LOOPBACK, port))
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        timeout=deadline,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
