"""An optimizer: Lion, which takes the sign of an average of the gradients.

Guarantee: none is needed. It sees the noisy mean gradient alone, so whatever it does costs no privacy. What
it keeps between steps are named vectors (`slots`), which checkpoints hold: a resumed run goes on bit for
bit.
Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedsim import validate
from fedsim.optimizers import Optimizer


@dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of momentum and gradient mixed; weight decay is decoupled.

    Attributes:
        beta1: share of the momentum in what the sign is taken of.
        beta2: share of the momentum that is kept.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self):
        validate.in_range(self.beta1, 0.0, 1.0, "optimizer.options.beta1")
        validate.in_range(self.beta2, 0.0, 1.0, "optimizer.options.beta2")

    def updated(self, params, gradient, slots, step):
        """New parameters; the slots are changed in place, `params` is not."""
        momentum = slots["momentum"]
        direction = (self.beta1 * momentum + (1 - self.beta1) * gradient).sign()
        momentum.mul_(self.beta2).add_(gradient, alpha=1 - self.beta2)
        return params - step.rate * (direction + step.weight_decay * params)
