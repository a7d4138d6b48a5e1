"""What a node was told in a step: it answers one story, however often it is asked.

What holders hide their sums with (masks, shares of the noise) follows from the step's key of the holders. Two
answers under one key that differ in anything else show the difference of two exact sums, and two reveals both
secrets of a mask. So a node that is given such a key keeps digests of all it was told in the step, answers
again only to the same, and gives the same answer. The memory is that of a node in one run (Flower's Context).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import digest
from fedsim.types import StepTask
from fedsim.validate import RunError

HOLDERS = "holders"
"""The key, of a task's keys, that the hidden randomness of holders follows from."""


@dataclass
class Asked:
    """The memory; it changes as the node answers.

    Attributes:
        step: the newest step the node answered, -1 before the first.
        told: digests of what was said in that step, by name.
        answered: digests of the answers given in it, by stage.
    """

    step: int = -1
    told: dict[str, bytes] = field(default_factory=dict)
    answered: dict[str, bytes] = field(default_factory=dict)

    def admit(
        self, task: StepTask, parameters: NDArray[Any], config_digest: str, stages: Sequence[str]
    ) -> None:
        """Take note of a task, before it is answered.

        Raises:
            RunError: an unknown stage; or, where the task has a key of the holders: an earlier step, that key
                with another step, a stage before those it builds on, or anything told otherwise before.
        """
        if task.stage not in stages:
            raise RunError(f"node refused: stage {task.stage!r} is not one of {list(stages)}.")
        if HOLDERS not in task.keys:
            return
        said = _facts(task, parameters, config_digest)
        if task.step < self.step:
            raise RunError(f"node refused: it is at step {self.step} and was asked for step {task.step}.")
        if task.step > self.step:
            for name, same in (("configuration", True), (f"key {HOLDERS}", False)):
                if self.told and (self.told[name] == said[name]) != same:
                    raise RunError(
                        f"node refused: the {name} of step {self.step} {'changed' if same else 'came again'} "
                        f"in step {task.step}."
                    )
            self.step, self.told, self.answered = task.step, {}, {}
        for name, value in said.items():
            if self.told.get(name, value) != value:
                raise RunError(f"node refused: in step {task.step} it was told another {name} before.")
        if missing := [s for s in stages[: stages.index(task.stage)] if s not in self.answered]:
            raise RunError(
                f"node refused: stage {task.stage!r} of step {task.step} was asked for before {missing}."
            )
        self.told |= said

    def keep(self, task: StepTask, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take note of an answer, before it is given.

        Raises:
            RunError: it differs from the answer given before to the same task.
        """
        if HOLDERS not in task.keys:
            return
        given = digest.of(part for name in sorted(arrays) for part in _named(name, arrays[name]))
        if self.answered.setdefault(task.stage, given) != given:
            raise RunError(
                f"node refused: its second answer to stage {task.stage!r} of step {task.step} differs from "
                "the first, as sums in a free order do. Both together would show what the masks hide."
            )


def _facts(task: StepTask, parameters: NDArray[Any], config_digest: str) -> dict[str, bytes]:
    arrays = {f"array {name}": digest.of_array(values) for name, values in task.arrays.items()}
    keys = {f"key {name}": digest.of([key]) for name, key in task.keys.items()}
    return {
        "configuration": config_digest.encode(),
        "sampling rate": np.float64(task.sampling_rate).tobytes(),
        "parameters": digest.of_array(parameters),
        **keys,
        **arrays,
    }


def _named(name: str, values: NDArray[Any]) -> tuple[bytes, bytes]:
    return name.encode(), digest.of_array(values)
