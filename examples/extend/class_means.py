"""A query and its learner: noised sums and counts by class, and the linear head of the nearest class mean.

An example of class c adds its features x, clipped to norm C, to row c of the sums, and 1 to entry c of the
counts.

Guarantee: an example moves the sums by at most C and the counts by at most 1 (`Part.bound`; believed, and
the test tries it on neighbouring data). Both are released in every step; with shares a and 1 - a of the
budget their noise multipliers are sigma / sqrt(a) and sigma / sqrt(1 - a), which together are one Gaussian
release of sigma. What the learner does with them is post-processing.
Source: nearest class mean, Mensink et al. 2013, "Distance-Based Image Classification"; noisy sums and counts
as in Blum et al. 2005, "Practical Privacy: The SuLQ Framework".
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

import fedsim
from fedsim import validate
from fedsim.learners import Learner, Learning
from fedsim.learners.least_squares import LeastSquares
from fedsim.queries import Part, Query, Statistic
from fedsim.types import ClippedSum

FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class ClassMeans(Query):
    """Sums of clipped features and numbers of examples, by class.

    Attributes:
        counts_share: part of the budget that the counts get.
    """

    what: ClassVar[str] = "features by class"
    learner: ClassVar[str] = f"{__name__}:NearestMean"
    measures_loss: ClassVar[bool] = False
    counts_share: float = 0.1

    def __post_init__(self):
        validate.in_range(self.counts_share, 1e-6, 1 - 1e-6, "query.options.counts_share")

    def check(self, config):
        """Refuse tasks without one class an example, and rules that are not for whole vectors."""
        if config.task.name != "classification" or config.privacy.clipping.name != "flat":
            raise fedsim.InputError("ClassMeans needs task=classification and privacy.clipping=flat.")

    def statistic(self, shape, clip, state):
        """The parts, each with the bound on one example; the bounds are infinite where nothing is private."""
        count_bound = 1.0 if math.isfinite(clip.sensitivity) else math.inf
        sums = Part("sums", shape.outputs * shape.features, FLOAT64, clip.sensitivity)
        return Statistic((sums, Part("counts", shape.outputs, FLOAT64, count_bound, "noise of counts")))

    def multipliers(self, noise_multiplier, expected_units):
        """The sum of 1 / multiplier^2 is that of the whole."""
        shares = 1.0 - self.counts_share, self.counts_share
        return tuple(noise_multiplier / math.sqrt(share) for share in shares)

    def sums(self, node, task, clip):
        """The sums over the node's drawn examples, and what the statistics of the step are made of."""
        inputs, classes = node.plain(node.drawn(task))
        rows = inputs.flatten(1).double().cpu()
        norms = torch.linalg.vector_norm(rows, dim=1)
        rows = clip.coefficients(norms)[:, None] * rows.nan_to_num(0.0, 0.0, 0.0)
        sums = torch.zeros(node.outputs, rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, classes.cpu(), rows)
        counts = torch.bincount(classes.cpu(), minlength=node.outputs).double()
        nothing = torch.zeros(0, dtype=torch.float64)
        result = ClippedSum(nothing, len(rows), clip.sensitivity, norms, nothing)
        return {"sums": sums.flatten().numpy(), "counts": counts.numpy()}, result


@dataclass(frozen=True)
class NearestMean(Learner):
    """The linear head whose largest output is the class with the nearest mean; for query ClassMeans."""

    takes: ClassVar[tuple[str, ...]] = ("sums", "counts")
    needs_fresh_noise: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = LeastSquares.unread  # settings of optimizers: set, they are refused

    def start(self, config, query, layout, examples):
        """The learner at work, on weights (k, d) and biases (k,)."""
        shapes = layout.shapes
        if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
            raise fedsim.InputError("NearestMean makes one linear layer. Use model.name=linear.")
        return Nearest()


class Nearest(Learning):
    """Sums and counts of all steps so far, and the head that follows from them."""

    def init(self, params):
        self._total, self._steps = {}, 0

    def update(self, params, means, step_index):
        self._steps += 1
        for name in NearestMean.takes:
            self._total[name] = self._total.get(name, 0.0) + torch.from_numpy(means.values[name])
        # A count below its own noise may be of a class that nobody has: it is taken for that noise.
        least = max(means.noise_stds.get("counts", 0.0), 1e-9) * math.sqrt(self._steps)
        counts = self._total["counts"].clamp(min=least)
        mean = self._total["sums"].reshape(len(counts), -1) / counts[:, None]
        return torch.cat([mean.flatten(), -mean.square().sum(1) / 2.0]).to(params.dtype)

    def state_dict(self):
        return {name: value.clone() for name, value in self._total.items()}, {"steps": self._steps}

    def load_state_dict(self, tensors, numbers):
        self._total = {name: value.clone() for name, value in tensors.items()}
        self._steps = numbers["steps"]
