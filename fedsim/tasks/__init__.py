"""What a model is trained for, one file a task."""

from __future__ import annotations

from fedsim.headline import Metric
from fedsim.registry import Registry
from fedsim.tasks.base import Meter, Task, metric

__all__ = ["TASKS", "Meter", "Metric", "Task", "metric"]

TASKS: Registry[Task] = Registry("task.name", "fedsim.tasks", Task)
