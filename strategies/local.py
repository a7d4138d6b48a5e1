"""Local trust: every holder adds the full noise to its own sum before anything leaves it.

Who is trusted: nobody but the holder itself; the server and the other holders may look at every message. What
is sent: a holder's sum of clipped gradients plus its own noise (holders of one node are added up after that,
which is post-processing). Where noise is added: at every holder, the full noise of the mechanism, so the sum
carries `holders` times its variance. `Release.noise_stds` are of one holder's noise; `noise_std_of_sum` is
what reaches the update. Unit: example; a whole holder cannot be one, because the noise that would hide it
leaves with it. Event: as under central trust: an example is in one holder's sum, and the event bounds what
that holder's message tells. Dropout policy: a node that fails is asked once more with
the same keys, then the run stops; holders that are offline send neither sum nor noise, and what the others
sent is protected as before.

Longer local training (`local_steps` E above 1): every online holder makes E steps of DP-SGD on its own model,
each with a Poisson draw of its own examples and noise of its own, and sends how far its model moved; the
server averages that over holders. A local step divides by the public number of examples an online holder
draws on average, B / (holders * availability), so holders weigh by how many examples they draw, as in one
central sum, and nothing is divided by a holder's private size. Event of a step: E Poisson-sampled Gaussians
at rate q, composed, whether an observer sees the models in between or not; the change of the model is
post-processing of them. With E = 1 and local learning rate 1 both forms are the same update. The sum sent is
in units of gradient sums (model change times that public number), so `train.expected_batch_size` divides it
as everywhere; the realised batch counts all E draws.

What is simulated: amplification by sampling holds against a server that does not know the draw, so holders
must draw for themselves; here the draw and the holders' noise follow from step keys that travel in the task,
so that any process can serve any node and a repeated step repeats its messages. In a deployment each holder
keeps a secret of its own for both.

Source: Abadi et al. 2016, Algorithm 1, run by each holder, as in local training with Opacus; averaging of
models after local steps: McMahan et al. 2017, Algorithm 1; for the cost of the model, Kasiviswanathan et al.
2011, "What Can We Learn Privately?".
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import dp_accounting
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.noise.gaussian import standard_normal
from fedsim.privacy import events
from fedsim.queries.base import Arrays, NodeView
from fedsim.samplers import Participation
from fedsim.seeds import Root, derive
from fedsim.strategies import STRATEGIES
from fedsim.strategies.base import Ask, Collected, Noise, Release, Setting, Sums, Trust, Units
from fedsim.types import ClippedSum, HolderReply, StepTask

_STD = "noise_std of "  # name of what tells nodes the noise of a part


@STRATEGIES.register("local")
@dataclass(frozen=True)
class Local(Trust):
    """Every holder adds the full noise to its own sum before anything leaves it.

    Attributes:
        local_steps: E, DP-SGD steps a holder makes before it sends; 1: it sends one noised sum.
        local_learning_rate: of those steps, plain SGD; stays 1 where `local_steps` is 1.
    """

    local_steps: int = 1
    local_learning_rate: float = 1.0

    trusted = "nobody"
    sent = "noised sum of clipped {what} of each holder, or its model's change by such steps"
    noise_added = "every holder, in full, on its own sum"
    dropout_policy = "ask once more with the same keys, then stop"
    simulates_secrets = True
    adapts = False

    def __post_init__(self) -> None:
        validate.positive(self.local_steps, "strategy.options.local_steps")
        validate.positive(self.local_learning_rate, "strategy.options.local_learning_rate")
        if self.local_steps == 1 and self.local_learning_rate != 1.0:
            validate.conflicts(
                "strategy.options.local_learning_rate must be 1 with one local step, got "
                f"{self.local_learning_rate:g}: it would only scale optimizer.learning_rate.",
                "Set optimizer.learning_rate, or local_steps above 1.",
            )

    def check(self, at: Setting) -> None:
        """See `Trust.check`."""
        super().check(at)
        if at.query.unit != "example":
            validate.conflicts(
                f"strategy=local does not go with query={at.config.query.name}: what hides a holder is noise "
                "that it makes itself, which is missing where the holder is.",
                "Use strategy=central or shares, or a query whose unit is the example.",
            )
        chosen = at.config.query.name, at.config.sampler.name
        if self.local_steps > 1 and chosen != ("gradient", "poisson"):
            validate.conflicts(
                "strategy.options.local_steps above 1 makes steps of DP-SGD with Poisson draws, but query "
                f"and sampler are {chosen[0]} and {chosen[1]}.",
                "Use query=gradient and sampler=poisson, or local_steps 1.",
            )

    def event(self, at: Setting, noise_multiplier: float, taking: Participation) -> dp_accounting.DpEvent:
        """See `Trust.event`: all local steps of a message, composed."""
        return events.composed(super().event(at, noise_multiplier, taking), self.local_steps)

    def keys(self, at: Setting, root: Root, step: int) -> dict[str, bytes]:
        """See `Trust.keys`: what the holders' own noise derives from."""
        return {"holders": derive(root, "holders", step)}

    def answer(self, at: Setting, node: NodeView, task: StepTask) -> tuple[Arrays, ClippedSum]:
        """Add up what each online holder of the node sends; the order of adding is free."""
        if self.local_steps > 1:
            result = self._trained(at, node, task)
            return {"sum": result.sum.cpu().numpy()}, result
        exact, result = at.sums(node, task)
        noised = {name: values.astype(np.float64) for name, values in exact.items()}
        for holder in node.online(node.holders, task).tolist():
            for name, values in noised.items():
                values += _noise(task, holder, name, len(values))
        return {name: values.astype(exact[name].dtype) for name, values in noised.items()}, result

    def _trained(self, at: Setting, node: NodeView, task: StepTask) -> ClippedSum:
        """Train at every online holder; return the sum of the moves, in units of gradient sums, with the
        statistics of all local steps."""
        tasks = [_local_task(task, local) for local in range(self.local_steps)]
        drawn = [node.drawn(local) for local in tasks]
        rate, one_batch = self.local_learning_rate, _local_divisor(at)
        total, parts = node.zero_sum(), []
        for holder in node.online(node.holders, task).tolist():
            moved = node.zero_sum()
            for local, ids in zip(tasks, drawn, strict=True):
                with node.moved(moved):
                    part = node.clipped_sum(ids[node.owners(ids) == holder], local, at.clip)
                noise = torch.from_numpy(_noise(local, holder, "sum", len(moved))).to(moved.device)
                moved += (rate / one_batch * (part.sum.double() + noise)).to(moved.dtype)
                parts.append(part)
            total += one_batch * moved
        return ClippedSum(
            total,
            sum(part.count for part in parts),
            at.clip.sensitivity,
            _joined([part.norms for part in parts]),
            _joined([part.losses for part in parts]),
        )

    def collect(self, at: Setting, release: Release, along: Arrays, ask: Ask) -> Collected:
        """See `Trust.collect`; nodes are told the noise of a holder."""
        stds = {_STD + name: np.array([std]) for name, std in release.noise_stds.items()}
        return super().collect(at, release, along | stds, ask)

    def added(
        self, at: Setting, release: Release, got: Collected, noise: Noise, root: Root, step: int
    ) -> Sums:
        """See `Trust.added`: nothing, the noise came with the sums."""
        return {}

    def counted_at_most(self, at: Setting, task: StepTask, units: Units) -> int:
        """See `Trust.counted_at_most`: the draws of all local steps."""
        tasks = [_local_task(task, local) for local in range(self.local_steps)]
        return sum(super(Local, self).counted_at_most(at, local, units) for local in tasks)

    def stds_of_sums(self, at: Setting, release: Release) -> dict[str, float]:
        """See `Trust.stds_of_sums`: that of every holder, of those online on average."""
        holders = at.config.federation.holders * at.config.federation.availability
        return {name: self._noise_std_of(release, name, holders) for name in release.noise_stds}

    def _noise_std_of(self, release: Release, part: str, holders: float) -> float:
        own = release.noise_stds[part]
        return self.local_learning_rate * own * math.sqrt(self.local_steps * holders)

    def norm_bounds(self, at: Setting, release: Release, reply: HolderReply) -> dict[str, float]:
        """Return the bound of the exact sums plus a length the noise exceeds with probability below 1e-20."""
        out: dict[str, float] = {}
        for name, exact in super().norm_bounds(at, release, reply).items():
            length = math.sqrt(reply.arrays[name].size) + 10.0
            noise = self._noise_std_of(release, name, len(reply.holders)) * length
            out[name] = self.local_learning_rate * exact + noise
        return out


def _local_divisor(at: Setting) -> float:
    """Examples an online holder draws in a local step on average: q N / holders."""
    federation = at.config.federation
    return at.config.train.expected_batch_size / (federation.holders * federation.availability)


def _local_task(task: StepTask, local: int) -> StepTask:
    """Return the task of one local step: draws, views and noise of its own, the same holders online."""
    if local == 0:
        return task
    own = {
        purpose: key if purpose == "availability" else derive(key, "local step", local)
        for purpose, key in task.keys.items()
    }
    return dataclasses.replace(task, keys=own)


def _noise(task: StepTask, holder: int, part: str, count: int) -> NDArray[np.float64]:
    """Return a holder's noise on one part of its sum, float64 (count,)."""
    purpose = "local noise" if part == "sum" else f"local noise of {part}"
    key = derive(task.keys["holders"], purpose, holder)
    return float(task.arrays[_STD + part][0]) * standard_normal(key, count)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
