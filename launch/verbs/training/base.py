"""The registry of trainings: what ``apb train NAME`` can train."""

from __future__ import annotations

from burst.registry import Registry
from launch.verbs.base import Verb

TRAININGS: Registry[type[Verb]] = Registry("training", "launch.verbs.training", "train")
