"""What the server makes of a noisy statistic: new parameters. One learner a file."""

from __future__ import annotations

from fedsim.learners.base import Learner, Learning
from fedsim.queries.statistic import Means
from fedsim.registry import Registry

__all__ = ["LEARNERS", "Learner", "Learning", "Means"]

LEARNERS: Registry[Learner] = Registry("learner", "fedsim.learners", Learner)
