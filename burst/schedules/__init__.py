"""Schedules: every rank's computations and messages in program order, as data."""

from burst.schedules.base import Schedule
from burst.schedules.build import NAMES, cheapest_travel, head_groups, schedule
from burst.schedules.heads import head_split
from burst.schedules.payload import AttentionShape, Heads
from burst.schedules.steps import Compute, Fold, Parcel, Phase, Post, Regroup, ScheduleStep, Slot, Wait

__all__ = [
    "NAMES",
    "AttentionShape",
    "Compute",
    "Fold",
    "Heads",
    "Parcel",
    "Phase",
    "Post",
    "Regroup",
    "Schedule",
    "ScheduleStep",
    "Slot",
    "Wait",
    "cheapest_travel",
    "head_groups",
    "head_split",
    "schedule",
]
