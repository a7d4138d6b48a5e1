"""The values that travel: between the gradient engine, a node, the server and the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.visibility import Numbers, Tagged, shown

Histogram = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class ClippedSum:
    """Sum of clipped per-example gradients, never divided by anything.

    Attributes:
        sum: (P,) flat gradient over the trainable parameters in `named_parameters` order, the model's dtype.
        count: examples summed, non-finite ones included (their contribution is zero).
        sensitivity: L2 bound on the change of `sum` when one example is added or removed.
        norms: (count,) float64 per-example gradient norms before clipping; sensitive. NaN or inf where the
            gradient was not finite.
        losses: (count,) float64 per-example losses, mean over views; sensitive.
        clipped: (count,) bool, whether some part of the example's gradient was above its own bound, for a
            clip rule with bounds on parts; None: where the norm is above `sensitivity`. Sensitive.
        undecodable: examples whose picture cannot be decoded; they are among `count`, with a norm of NaN and
            a contribution of zero, or were left out of a holder's training. Sensitive.
    """

    sum: Tensor
    count: int
    sensitivity: float
    norms: Tensor
    losses: Tensor
    clipped: Tensor | None = None
    undecodable: int = 0


@dataclass(frozen=True)
class StepTask:
    """What the server asks of one node for one step.

    Attributes:
        step: server updates before this one.
        wave: message wave within the stage.
        stage: "" for the stage every strategy has; protocols of several messages a step name the others.
        sampling_rate: q of the step's draw.
        keys: this step's keys by purpose, 32 bytes each ("draw": which examples are in the virtual batch,
            "availability": which holders are online, "augment": how views look); all a node needs to know
            of the run's randomness.
        arrays: what a later stage sends along.
    """

    step: int
    wave: int
    sampling_rate: float
    keys: Mapping[str, bytes]
    stage: str = ""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class HolderReply:
    """What a node answers for the holders it hosts.

    Attributes:
        step, wave, stage: echo of the task.
        node: index of the node, 0 .. nodes - 1.
        holders: sorted ids of the holders this reply stands for.
        code_hash: digest of the package source the node runs.
        arrays: named arrays; for sum-based strategies `{"sum": (P,)}`.
        count: examples drawn (the node's part of the realised batch size); sensitive.
        statistics: sensitive scalars and histograms (lists) that add up over nodes.
        seconds: where the node's time went.
    """

    step: int
    wave: int
    node: int
    holders: NDArray[np.int64]
    code_hash: str
    arrays: Mapping[str, NDArray[Any]]
    count: int
    statistics: Mapping[str, float | list[float]]
    seconds: Mapping[str, float]
    stage: str = ""


@dataclass(frozen=True)
class NodeFailure:
    """A node that answered with an error, or not at all.

    Attributes:
        node: its index.
        reason: what is wrong, in full; may hold numbers of the reply and words of the node: sensitive.
        fatal: whether its process is gone.
        kind: what may be said of it in public.
    """

    node: int
    reason: str
    fatal: bool
    kind: str = "its reply was refused"


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture to look at.

    Attributes:
        image: (H, W, C) uint8, C of 1 or 3.
        said: what the model says of it.
        own: what its target says.
    """

    image: NDArray[np.uint8]
    said: str
    own: str


@dataclass(frozen=True)
class StepRecord:
    """What is known after `step` completed updates, each number tagged where it was made.

    Attributes:
        step: completed updates.
        numbers: scalars; None, NaN or infinite where one is not defined, which files write as null.
        histograms: (edges, counts).
        samples: pictures and what the model says of them, where it was evaluated and says something.

    Raises:
        TypeError: a number is not tagged.
    """

    step: int
    numbers: Numbers
    histograms: Mapping[str, Tagged[Histogram]] = field(default_factory=dict)
    samples: Tagged[tuple[Sample, ...]] | None = None

    def __post_init__(self) -> None:
        samples = {} if self.samples is None else {"samples": self.samples}
        for tagged in (self.numbers, self.histograms, samples):
            shown(tagged, public_only=True)


class Transport(Protocol):
    """How the server reaches its nodes; the Flower adapter is one, tests use others.

    `parallel` says whether nodes compute at the same time, so that the longest of their times counts;
    `packing_seconds` what packing and unpacking took in the last `ask`.
    """

    parallel: bool
    packing_seconds: float

    def connect(self) -> list[int]:
        """Wait until every node is there, check its code, and return the node indices 0 .. nodes - 1."""
        ...

    def online(self) -> list[int]:
        """Return the indices of the nodes that can take a message now."""
        ...

    def ask(self, tasks: Mapping[int, StepTask], parameters: NDArray[Any]) -> list[HolderReply | NodeFailure]:
        """Send each node its task with the flat parameters; return what came back, in any order."""
        ...
