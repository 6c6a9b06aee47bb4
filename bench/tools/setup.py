"""A benchmark's own model, from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apb.engine.setup import Setup
from launch.config.build import basics
from launch.config.settings import Basics
from launch.config.typed import typed
from launch.terminal.display import Display
from launch.verbs.prefill.prepare import make_setup


def base_setup(config: Mapping[str, Any], display: Display, threads: int = 1) -> Setup:
    """Return the model on one host, with full attention; ``bench`` has dtype and device."""
    own = config["bench"]
    stated = {"strategy": {"name": "full"}, "cluster": {"name": "virtual", "hosts": 1, "threads": threads}}
    named = {**config, **stated, "dtype": own["dtype"], "device": own["device"], "timeout_s": 600.0, "compress": None}
    return make_setup(typed(Basics, basics(named), ""), display)
