"""Local DP-SGD: every holder adds the full noise to its own sum before anything leaves it.

Who is trusted: nobody but the holder itself; the server and the other holders may look at every message. What
is sent: a holder's sum of clipped gradients plus its own noise (holders of one node are added up after that,
which is post-processing). Where noise is added: at every holder, the full noise of the mechanism, so the sum
carries `holders` times its variance. `plan.noise` is one holder's noise; `noise_std_of_sum` is what reaches
the update. Unit: example. Event: Poisson-sampled Gaussian, one a step: an example is in one holder's sum, and
the event bounds what that holder's message tells. Dropout policy: a node that fails is asked once more with
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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import validate
from fedsim.config import Config
from fedsim.noise.gaussian import GaussianNoise, standard_normal
from fedsim.privacy import events
from fedsim.privacy.budget import within_budget
from fedsim.privacy.family import EventFamily
from fedsim.sampling import sampling_rate
from fedsim.seeds import Root, derive
from fedsim.strategies.base import Ask, DataFacts, NodeView, Plan, Strategy
from fedsim.types import ClippedSum, HolderReply, StepTask


@dataclass(frozen=True)
class LocalOptions:
    """Options of local_dpsgd.

    Attributes:
        local_steps: E, DP-SGD steps a holder makes before it sends; 1: it sends one noised gradient sum.
        local_learning_rate: of those steps, plain SGD; stays 1 where `local_steps` is 1.
    """

    local_steps: int = 1
    local_learning_rate: float = 1.0


class LocalDPSGD(Strategy[LocalOptions]):
    Options = LocalOptions
    private = True
    trusted = "nobody"
    sent = "noised sum of clipped per-example gradients of each holder, or its model's change by such steps"
    simulates_secrets = True
    noise_added = "every holder, in full, on its own sum"
    dropout_policy = "ask once more with the same keys, then stop"

    def __init__(self, config: Config, options: LocalOptions) -> None:
        super().__init__(config, options)
        validate.positive(options.local_steps, "strategy.options.local_steps")
        validate.positive(options.local_learning_rate, "strategy.options.local_learning_rate")
        if options.local_steps == 1 and options.local_learning_rate != 1.0:
            validate.conflicts(
                "strategy.options.local_learning_rate must be 1 with one local step, got "
                f"{options.local_learning_rate:g}: it would only scale optimizer.learning_rate.",
                "Set optimizer.learning_rate, or local_steps above 1.",
            )

    def plan(self, facts: DataFacts) -> Plan:
        train, local = self.config.train, self.options.local_steps
        rate = sampling_rate(train.expected_batch_size, facts.examples, self.config.federation.availability)
        family = EventFamily(lambda sigma: events.composed(events.gaussian_step(sigma, rate), local))
        budget = within_budget(self.config.privacy, family, train.steps)
        clip = self.clip_rule()
        return Plan(
            unit="example",
            sampling_rate=rate,
            divisor=train.expected_batch_size,
            clip=clip,
            noise=GaussianNoise(budget.noise_multiplier, clip.sensitivity),
            budget=budget,
        )

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        return {**super().keys(root, step), "holders": derive(root, "holders", step)}

    def answer(self, node: NodeView, task: StepTask) -> tuple[dict[str, NDArray[Any]], ClippedSum]:
        """Add up what each online holder of the node sends; the order of adding is free."""
        if self.options.local_steps > 1:
            result = self._trained(node, task)
            return {"sum": result.sum.cpu().numpy()}, result
        result = node.clipped_sum(node.drawn(task), task, self.clip_rule())
        exact = result.sum.cpu().numpy()
        noised = exact.astype(np.float64)
        for holder in node.online(node.holders, task).tolist():
            noised += _noise(task, holder, len(noised))
        return {"sum": noised.astype(exact.dtype)}, result

    def _trained(self, node: NodeView, task: StepTask) -> ClippedSum:
        """Train at every online holder; return the sum of the moves, in units of gradient sums, with the
        statistics of all local steps."""
        tasks = [_local_task(task, local) for local in range(self.options.local_steps)]
        drawn = [node.drawn(local) for local in tasks]
        clip, rate, one_batch = self.clip_rule(), self.options.local_learning_rate, self._local_divisor
        total, parts = node.zero_sum(), []
        for holder in node.online(node.holders, task).tolist():
            moved = node.zero_sum()
            for local, ids in zip(tasks, drawn, strict=True):
                with node.moved(moved):
                    part = node.clipped_sum(ids[node.owners(ids) == holder], local, clip)
                noise = torch.from_numpy(_noise(local, holder, len(moved))).to(moved.device)
                moved += (rate / one_batch * (part.sum.double() + noise)).to(moved.dtype)
                parts.append(part)
            total += one_batch * moved
        return ClippedSum(
            total,
            sum(part.count for part in parts),
            clip.sensitivity,
            _joined([part.norms for part in parts]),
            _joined([part.losses for part in parts]),
        )

    @property
    def _local_divisor(self) -> float:
        """Examples an online holder draws in a local step on average: q N / holders."""
        federation = self.config.federation
        return self.config.train.expected_batch_size / (federation.holders * federation.availability)

    def collect(self, plan: Plan, ask: Ask) -> tuple[NDArray[np.float64], list[HolderReply]]:
        assert plan.noise is not None
        arrays = {"noise_std": np.array([plan.noise.noise_std])}
        return super().collect(plan, lambda stage, _: ask(stage, arrays))

    def noise(self, plan: Plan, root: Root, step: int, count: int) -> None:
        """Add nothing: the noise came with the sums."""

    def counted_at_most(self, task: StepTask, holders: NDArray[np.int64], ids: NDArray[np.int64]) -> int:
        tasks = [_local_task(task, local) for local in range(self.options.local_steps)]
        return sum(super(LocalDPSGD, self).counted_at_most(local, holders, ids) for local in tasks)

    def noise_std_of_sum(self, plan: Plan) -> float:
        return self._noise_std_of(plan, self.config.federation.holders)

    def _noise_std_of(self, plan: Plan, holders: int) -> float:
        assert plan.noise is not None
        options = self.options
        return options.local_learning_rate * plan.noise.noise_std * math.sqrt(options.local_steps * holders)

    def norm_bound(self, plan: Plan, reply: HolderReply) -> float:
        """Return the bound of the exact sum plus a length the noise exceeds with probability below 1e-20."""
        exact = self.options.local_learning_rate * super().norm_bound(plan, reply)
        length = math.sqrt(reply.arrays["sum"].size) + 10.0
        return exact + self._noise_std_of(plan, len(reply.holders)) * length


def _local_task(task: StepTask, local: int) -> StepTask:
    """Return the task of one local step: draws, views and noise of its own, the same holders online."""
    if local == 0:
        return task
    own = {
        purpose: key if purpose == "availability" else derive(key, "local step", local)
        for purpose, key in task.keys.items()
    }
    return dataclasses.replace(task, keys=own)


def _noise(task: StepTask, holder: int, count: int) -> NDArray[np.float64]:
    """Return a holder's noise on one sum, float64 (count,)."""
    key = derive(task.keys["holders"], "local noise", holder)
    return float(task.arrays["noise_std"][0]) * standard_normal(key, count)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


STRATEGY = LocalDPSGD
