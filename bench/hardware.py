"""The device that numbers come from, by name."""

from __future__ import annotations

import torch

from apb.engine.setup import Setup
from bench.verify.runner import cpu_name


def hardware(setup: Setup) -> str:
    """Name the device that a setup computes on."""
    return torch.cuda.get_device_name(setup.spec.device) if setup.spec.device != "cpu" else cpu_name()
