"""Preparation of ask and plan before any host starts: settings made into a setup that is known to fit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apb.engine.options import EngineOptions
from apb.engine.setup import Setup, fitting_chunk, needed_bytes, on_cluster
from apb.host.process import available_bytes
from apb.models.fetch.resolve import resolve
from apb.models.files import read_json
from apb.plan.plan import PrefillPlan
from launch.config.settings import Basics, DecodeSettings, Settings
from launch.terminal.display import Display, size


@dataclass(frozen=True)
class Room:
    """``available`` bytes (None: not known) that ``sharing`` hosts share, with ``copies`` of the weights."""

    available: int | None
    sharing: int
    copies: int
    where: str


def make_setup(settings: Basics, display: Display, decode: DecodeSettings | None = None) -> Setup:
    """Resolve the settings' names and fetch the model if need be; raises UserError. ``decode``: where it decodes."""
    with display.progress(_amount) as on_progress:
        options = EngineOptions(
            model=settings.model,
            strategy=settings.strategy,
            compress=settings.compress,
            dtype=settings.dtype,
            device=settings.device,
            timeout_s=settings.timeout_s,
            max_positions=settings.max_positions,
            yarn=settings.yarn,
            draft=decode.draft if decode is not None else None,
            graphs=decode.graphs if decode is not None else True,
        )
        setup = Setup.make(
            on_cluster(options, settings.cluster),
            config=_random_weights(settings),
            cache_dir=Path(cache) if (cache := os.environ.get("APB_CACHE")) else None,
            on_progress=on_progress,
        )
    spec = dataclasses.replace(setup.spec, threads=threads(settings, setup.hosts))
    return dataclasses.replace(setup, spec=spec)


def in_chunks(setup: Setup, plan: PrefillPlan, settings: Settings, display: Display) -> tuple[Setup, PrefillPlan]:
    """Return setup and plan with the chunks as set; where that is ``auto``, with the longest that the memory allows."""
    chunk = settings.chunk_tokens
    if chunk == "auto":
        chunk, room, answer = None, _room(setup, settings), settings.decode.answer
        if room.available is not None:
            shared = {"sharing": room.sharing, "copies": room.copies}
            if needed_bytes(plan, answer, **shared) > room.available:
                chunk = fitting_chunk(plan, answer, room.available, **shared)
        if chunk is not None:
            display.note(f"Blocks run in chunks of {chunk:,} tokens to fit into memory (chunk_tokens).")
    return dataclasses.replace(setup, chunk_tokens=chunk), dataclasses.replace(plan, chunk_tokens=chunk)


def check_fits(setup: Setup, plan: PrefillPlan, settings: Settings) -> Room:
    """Refuse a plan that does not fit into the memory at hand; raises UserError. Returns what was assumed."""
    room = _room(setup, settings)
    if room.available is not None:
        setup.check_memory(plan, settings.decode.answer, room.available, sharing=room.sharing, copies=room.copies)
    return room


def cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(settings: Basics, hosts: int) -> int:
    """Return the CPU threads a host: as set, else the cores shared out where all hosts stand on this machine.

    More threads than cores are many times slower than one a host.
    """
    if settings.cluster.threads is not None:
        return settings.cluster.threads
    local = settings.cluster.local_hosts(hosts)
    return 1 if settings.cluster.one_process or local is None else max(1, cores() // local)


def sharing(settings: Settings, device: str, hosts: int) -> int:
    """Return how many hosts compute with the same processor: this machine's cores, or one GPU; 1 if not known."""
    if settings.cluster.one_process:
        return hosts
    return 1 if device.startswith("cuda") else settings.cluster.local_hosts(hosts) or 1


def _random_weights(settings: Basics) -> Mapping[str, Any] | None:
    """Return the configuration of a model with random weights: conf/model's own, or that of FOLDER in FOLDER-shape."""
    name, found, _ = settings.model.rpartition("-shape")
    if settings.config is not None or not found:
        return settings.config
    folder = resolve(name)
    return read_json(folder / "config.json")


def _room(setup: Setup, settings: Settings) -> Room:
    if settings.memory_gb is not None:
        return Room(int(settings.memory_gb * 1e9), 1, 1, "each host's machine")
    if settings.cluster.local_hosts(setup.hosts) is None:
        return Room(None, 1, 1, "other machines")
    together = sharing(settings, setup.spec.device, setup.hosts)
    free = available_bytes(torch.device(setup.spec.device))
    if setup.spec.device.startswith("cuda"):
        return Room(free, together, 1, "the GPU")
    return Room(free, together, 1 if settings.cluster.one_process else together, "this machine")


def _amount(count: int) -> str:
    return size(count) if count >= 1000 else str(count)
