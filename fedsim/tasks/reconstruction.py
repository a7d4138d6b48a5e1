"""What is hidden of a picture, pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data.targets import Targets
from fedsim.headline import Metric
from fedsim.tasks import TASKS
from fedsim.tasks.base import Task
from fedsim.validate import InputError


@TASKS.register("reconstruction")
@dataclass(frozen=True)
class Reconstruction(Task):
    """The hidden patches of a picture, from those that are seen (He et al. 2022; privately Yu et al. 2023).

    The unit of privacy is a picture. Its loss is the mean square of what the model gives, which is what it
    says less what is there (model=masked_autoencoder); targets of the data, whatever they are, are not looked
    at.
    """

    own_metrics: ClassVar[tuple[Metric, ...]] = (Metric("squared_error", higher_is_better=False),)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`; outputs are (n, hidden, pixels)."""
        return outputs.square().flatten(1).mean(1)

    def measures(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """See `Task.measures`."""
        return {"squared_error": self.loss(outputs, targets)}

    def check(self, declared: Targets) -> None:
        """See `Task.check`: any targets do."""
        self.chosen  # noqa: B018 - a headline that is no metric is refused here

    def strata(self, targets: NDArray[Any]) -> None:
        """See `Task.strata`: none, for targets are not looked at."""

    def answered(self, model: nn.Module, inputs: Tensor, blank: Tensor) -> Tensor:
        """See `Task.answered`.

        Raises:
            InputError: always: such a model says nothing of an example that one does not have.
        """
        raise InputError(
            "a model of task=reconstruction says what is hidden of a picture, nothing about it: its encoder "
            "is what is kept. Look at its features with fedsim probe, or start another run from its weights."
        )
