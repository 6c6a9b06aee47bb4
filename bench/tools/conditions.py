"""Conditions of a number: device, versions, commit, date, configuration, command."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from apb.engine.engine import versions
from apb.engine.setup import Setup


def hardware(setup: Setup) -> str:
    """Return the name of the device that a setup computes on."""
    return torch.cuda.get_device_name(setup.spec.device) if setup.spec.device != "cpu" else cpu_name()


def conditions() -> dict[str, Any]:
    """Return machine, versions, commit and date."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def provenance(config: Mapping[str, Any], hardware: str) -> dict[str, Any]:
    """Return what every row says of its origin: hardware, conditions, configuration, command."""
    settings = {key: value for key, value in config.items() if key not in ("command", "out")}
    return {"hardware": hardware, **conditions(), "command": config["command"], "configuration": settings}


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


@cache
def commit() -> str:
    """Return the commit that is measured, with ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
