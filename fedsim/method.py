"""What a configuration chooses on the axes of a method, as far as data does not matter: what a node knows.

`fedsim.mechanism` adds what the server knows of the data. Variants that do not go together are refused here
where the configuration alone tells, and there where sizes do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsim import references, rules, validate
from fedsim.clipping.none import NoClip
from fedsim.config import Config
from fedsim.learners import LEARNERS, Learner
from fedsim.merging import Choice
from fedsim.noise import NOISE
from fedsim.privacy import accountant
from fedsim.queries import QUERIES
from fedsim.queries.base import Arrays, NodeView, Shape
from fedsim.samplers import SAMPLERS
from fedsim.seeds import Root, derive
from fedsim.strategies import STRATEGIES, Trust
from fedsim.strategies.base import Setting, Units
from fedsim.types import ClippedSum, StepTask
from fedsim.validate import InputError

_ANY = Shape(4, 1, 2, np.dtype(np.float32))


@dataclass(frozen=True)
class Method:
    """The axes a configuration chooses, as far as data does not matter."""

    at: Setting
    trust: Trust
    learner: Learner

    @classmethod
    def of(cls, config: Config) -> Method:
        """Return what the configuration chooses.

        Raises:
            InputError: an unknown variant or option (with the nearest valid one), a setting that none of the
                chosen ones reads, or variants that do not go together.
        """
        config = imitating(config)
        trust = STRATEGIES.make(Choice(config.strategy.name, config.strategy.options))
        query, sampler = QUERIES.make(config.query), SAMPLERS.make(config.sampler)
        chosen_learner = Choice(query.learner) if config.learner is None else config.learner
        if not chosen_learner.name:  # options alone: of the learner that goes with the query
            chosen_learner = Choice(query.learner, chosen_learner.options)
        file, of_query = (name.partition(":")[0] for name in (chosen_learner.name, config.query.name))
        if config.learner is None and references.is_reference(chosen_learner.name) and file != of_query:
            validate.conflicts(
                f"query={config.query.name} goes with learner {chosen_learner.name} of another file, which "
                "would neither travel to nodes nor be in the hash of a run's code.",
                f"Set learner={chosen_learner.name}.",
            )
        learner = LEARNERS.make(chosen_learner)
        for unread, chosen in (
            (learner.unread, f"learner = {chosen_learner.name}"),
            (trust.unread, f"strategy = {config.strategy.name}"),
            (query.unread, f"query = {config.query.name}"),
        ):
            rules.refuse_set(config, unread, chosen)
        query.check(config)
        sampler.check(config)
        clip = query.clip(config) if trust.private else NoClip()
        at = Setting(config, query, sampler, NOISE.make(config.noise), clip)
        accountant.refuse_approximation(config.privacy.accountant)
        trust.check(at)
        if query.adaptive and config.noise.name != "independent":
            validate.conflicts(
                "query.options.target_quantile moves the bound on a contribution from step to step, but "
                f"noise={config.noise.name} has one scale for several steps, or changes the parts' budget.",
                "Leave it null, or use noise=independent.",
            )
        if learner.needs_fresh_noise and config.noise.name != "independent":
            validate.conflicts(
                f"learner={chosen_learner.name} weighs its sums by the scale of independent noise, but "
                f"noise={config.noise.name}.",
                "Use noise=independent.",
            )
        made = cls(at, trust, learner)
        factors, _ = made.phases()
        if factors != (1.0,) and config.noise.name != "independent":
            validate.conflicts(
                f"query={config.query.name} says itself what noise its steps have, or sums other things in "
                f"its first steps than in later ones: noise={config.noise.name} cannot hold that together.",
                "Use noise=independent.",
            )
        parts = {
            part.name
            for phase in range(len(factors))
            for part in query.statistic(replace(_ANY, phase=phase), clip, query.state(config)).parts
        }
        if lacking := [name for name in learner.takes if name not in parts]:
            validate.conflicts(
                f"learner={chosen_learner.name} needs {', '.join(lacking)}, but query={config.query.name} "
                f"gives {', '.join(sorted(parts))}.",
                f"Use learner={query.learner}, or another query.",
            )
        return made

    def phases(self) -> tuple[tuple[float, ...], list[int]]:
        """Return the factor of each of the query's phases, and the phase of every step of the planned run.

        Raises:
            InputError: factors that are no positive numbers, or a step of none of the phases.
        """
        config, query = self.at.config, self.at.query
        factors = tuple(query.factors(config.train.steps))
        for factor in factors:
            validate.positive(factor, f"every entry of factors() of query {config.query.name}")
        of_steps = [query.phase(step) for step in range(config.train.steps)]
        places = range(len(factors))
        if wrong := [p for p in dict.fromkeys(of_steps) if not isinstance(p, int) or p not in places]:
            raise InputError(
                f"phase() of query {config.query.name} must be a place in its factors(), 0 .. "
                f"{len(factors) - 1}, got {wrong[0]!r}."
            )
        return factors, of_steps

    @property
    def private(self) -> bool:
        """Return whether anything is protected."""
        return self.trust.private

    @property
    def unit(self) -> str:
        """Return who is drawn, bounded and protected: "example" or "holder"."""
        return self.at.query.unit

    @property
    def sent(self) -> str:
        """Return what travels, in words."""
        return self.trust.sent.format(what=self.at.query.what)

    @property
    def noise_added(self) -> str:
        """Return who adds noise, in words."""
        return "; ".join(part for part in (self.trust.noise_added, self.at.noise.said) if part)

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        """Return the keys nodes need for a step, by purpose."""
        common = {purpose: derive(root, purpose, step) for purpose in ("availability", "augment")}
        return self.at.sampler.keys(root, step) | common | self.trust.keys(self.at, root, step)

    def selected(self, task: StepTask, ids: NDArray[np.int64], population: int) -> NDArray[np.bool_]:
        """Say which of `ids`, of examples or holders as the unit is, the step draws, whoever owns them.

        Args:
            task: of the step.
            ids: (n,) any of 0 .. population - 1, in any order.
            population: how many units there are.
        """
        return self.at.selected(task, Units(ids, population))

    def answer(self, node: NodeView, task: StepTask) -> tuple[Arrays, ClippedSum]:
        """Do one node's part: return the named arrays to send, and the sum they come from for statistics."""
        return self.trust.answer(self.at, node, task)


def imitating(config: Config) -> Config:
    """Return the configuration with the noise that imitates a larger batch, where it says so.

    The noisy sum is divided by the expected batch size, so that a noise multiplier in proportion to it gives
    every update the noise of the larger batch's (Sander et al. 2023, "TAN", s. 3: sigma / B is what counts).
    """
    whole, train = config.train.imitated_batch_size, config.train
    if whole is None or config.privacy.noise_multiplier is None:
        return config
    sigma = config.privacy.noise_multiplier * train.expected_batch_size / whole
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, noise_multiplier=sigma))
