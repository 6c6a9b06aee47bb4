"""The registry of benchmarks: what ``apb bench NAME`` measures."""

from __future__ import annotations

from burst.registry import Registry
from launch.verbs.base import Verb

BENCHMARKS: Registry[type[Verb]] = Registry("benchmark", "bench.benchmarks", "bench")
