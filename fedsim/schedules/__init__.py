"""How the learning rate goes over a run, after its warm-up."""

from __future__ import annotations

from fedsim.registry import Registry
from fedsim.schedules.base import Function, Schedule

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES: Registry[Schedule] = Registry(
    "optimizer.schedule", "fedsim.schedules", Schedule, function=Function
)
