"""Variants from outside that say one thing and do another are noticed before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.accountants.pld import Pld
from fedsim.clipping.base import ClipRule
from fedsim.clipping.flat import FlatClip
from fedsim.clipping.per_layer import PerLayerClip
from fedsim.config import Config
from fedsim.engine.experiment import epsilons, prepare
from fedsim.headline import Metric
from fedsim.mechanism import Mechanism
from fedsim.noise.independent import Independent
from fedsim.noise.tree import Tree
from fedsim.optimizers.sgd import Sgd
from fedsim.privacy import events
from fedsim.queries.base import Arrays, NodeView, Query
from fedsim.queries.gradient import Gradient
from fedsim.queries.moments import Moments
from fedsim.samplers import Draw, Participation
from fedsim.samplers.fixed_size import FixedSize
from fedsim.samplers.keyed import PoissonSampler
from fedsim.samplers.poisson import Poisson
from fedsim.study.plan import describe
from fedsim.tasks.classification import Classification
from fedsim.types import ClippedSum, StepTask
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train

HERE = __name__


@dataclass(frozen=True)
class Honest(Poisson):
    """Poisson, written again."""

    def selected(self, draw: Draw, ids: Any) -> Any:
        return PoissonSampler(draw.share, max(1, len(ids))).included(ids, draw.keys["draw"])


@dataclass(frozen=True)
class Everyone(Poisson):
    """States a rate, and takes everybody."""

    def selected(self, draw: Draw, ids: Any) -> Any:
        return np.ones(len(ids), dtype=np.bool_)


@dataclass(frozen=True)
class Tiny(Poisson):
    """States a hundredth of the rate."""

    def participation(self, share: float, batch: float, units: int) -> Participation:
        return Participation(1, share / 100, 1, share)


@dataclass(frozen=True)
class SlowCycle(Poisson):
    """States one participation in ten steps, and draws in every one."""

    def participation(self, share: float, batch: float, units: int) -> Participation:
        return Participation(10, share, 10, share)


@dataclass(frozen=True)
class Indices(Poisson):
    """Returns who, not whether."""

    def selected(self, draw: Draw, ids: Any) -> Any:
        return ids[super().selected(draw, ids)]


@dataclass(frozen=True)
class Neighbours(Poisson):
    """Decides by the place in the question."""

    def selected(self, draw: Draw, ids: Any) -> Any:
        return np.arange(len(ids)) < draw.share * len(ids)


@dataclass(frozen=True)
class ZeroNorm(Independent):
    """Noise whose stated sensitivity makes it vanish."""

    def column_norm(self, participation: Participation, steps: int) -> float:
        return 0.0


@dataclass(frozen=True)
class SmallNorm(Tree):
    """A tree that pays for one level."""

    def column_norm(self, participation: Participation, steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Silent(Tree):
    """A tree that does not say it is one."""

    correlated = False


@dataclass(frozen=True)
class TwoMultipliers(Gradient):
    """More multipliers than parts."""

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        return noise_multiplier * 2, noise_multiplier * 2


@dataclass(frozen=True)
class FixedSizeAgain(FixedSize):
    """Honest; its draws have a fixed size."""


def test_honest_ones_run() -> None:
    for name in ("Honest", "FixedSizeAgain"):
        prepare(small(f"sampler={HERE}:{name}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Everyone", "the stated rate 0.15 allows"),
        ("Tiny", "the stated rate 0.0015 allows"),
        ("SlowCycle", "more than once in a cycle of 10 steps"),
        ("Indices", "must give a mask of shape"),
        ("Neighbours", "whoever else is asked about"),
    ],
)
def test_a_sampler_that_draws_otherwise_than_it_says_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(f"sampler={HERE}:{name}"))


@pytest.mark.parametrize(
    ("noise", "more", "message"),
    [
        ("ZeroNorm", [], "states a column norm of 0, but its factor has one of 1"),
        ("SmallNorm", ["sampler=passes"], "states a column norm of 1, but its factor has one of 1.7"),
        ("Silent", ["sampler=passes"], "correlated is False"),
    ],
)
def test_noise_that_states_less_than_its_sensitivity_is_refused(
    noise: str, more: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(f"noise={HERE}:{noise}", "train.expected_batch_size=100", *more))


def test_a_fixed_size_draw_of_ones_own_is_no_poisson_draw_under_a_secure_sum() -> None:
    with pytest.raises(InputError, match="is proved for Poisson draws"):
        prepare(small(f"sampler={HERE}:FixedSizeAgain", "strategy=shares"))


@dataclass(frozen=True)
class SumsAlone(Gradient):
    """Says how a node sums, and nothing of holders."""

    sums_by_holder = Query.sums_by_holder


def test_a_query_that_says_nothing_of_holders_goes_under_a_secure_sum(tmp_path: Path) -> None:
    """One holder after the other: the same sums as those of gradients over all holders at once."""
    quiet = ["strategy=shares", "privacy.noise_multiplier=1e-9", "model.dtype=float64", "train.steps=3"]
    train(small(*quiet), tmp_path / "all")
    train(small(*quiet, f"query={HERE}:SumsAlone"), tmp_path / "each")
    assert torch.max(torch.abs(final(tmp_path / "all") - final(tmp_path / "each"))) < 1e-7


@dataclass(frozen=True)
class LabelsFirst(Moments):
    """Sums up its parts in another order than its statistic has."""

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        arrays, result = super().sums(node, task, clip)
        return dict(reversed(arrays.items())), result


@dataclass(frozen=True)
class LabelsAlone(Moments):
    """Leaves out a part of its statistic."""

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        arrays, result = super().sums(node, task, clip)
        return {"first": arrays["first"]}, result


@dataclass(frozen=True)
class InSinglePrecision(Moments):
    """Sums up numbers of another kind than its statistic states."""

    def sums(self, node: NodeView, task: StepTask, clip: ClipRule) -> tuple[Arrays, ClippedSum]:
        arrays, result = super().sums(node, task, clip)
        return {name: values.astype(np.float32) for name, values in arrays.items()}, result


@dataclass(frozen=True)
class Phased(Gradient):
    """Gradients whose noise differs over the run as the options say, whatever that is."""

    of_phases: list[float] = field(default_factory=lambda: [1.0])
    last_phase: int = 0

    def factors(self, steps: int) -> tuple[float, ...]:
        return tuple(self.of_phases)

    def phase(self, step: int) -> int:
        return 1.0 if self.last_phase == 99 else min(step, self.last_phase)  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", ["central", "shares", "local"])
@pytest.mark.parametrize("factors", [[0.1], [0.1, 0.1], [10.0, 10.0], [3.0, 1.0]], ids=str)
def test_the_noise_of_a_step_is_that_of_its_event_whatever_the_factors(
    strategy: str, factors: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nobody drawn, the sums are the noise. False alarm 2e-9 each; rounding costs shares at most 1 %."""
    seen: list[np.ndarray] = []
    means = Mechanism.means
    monkeypatch.setattr(
        Mechanism,
        "means",
        lambda self, release, sums: (seen.append(sums["sum"].copy()), means(self, release, sums))[1],
    )
    options = f"{{of_phases: {factors}, last_phase: {len(factors) - 1}}}"
    config = small(
        f"query={{name: '{HERE}:Phased', options: {options}}}", f"strategy={strategy}", "train.steps=3",
        "privacy.noise_multiplier=5", "train.expected_batch_size=1e-9", "model.name=linear",
        "optimizer.learning_rate=1e-9",
    )  # fmt: skip
    train(config, tmp_path)
    mechanism = prepare(config).mechanism
    for step, values in enumerate(seen):
        recorded = events.releases(mechanism.event_at(step))[0].noise_multiplier
        std = float(np.sqrt(np.mean(np.square(values))))
        wanted = recorded * 0.5 * (10**0.5 if strategy == "local" else 1.0)
        within = 6 / (2 * values.size) ** 0.5
        assert 1 - within < std / wanted < 1.01 + within
        assert recorded == pytest.approx(5 * factors[min(step, len(factors) - 1)], rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{of_phases: [1.0], last_phase: 1}", "must be a place in its factors.., 0 .. 0, got 1"),
        ("{of_phases: [1.0, 2.0], last_phase: 99}", "must be a place in its factors.., 0 .. 1, got 1.0"),
        ("{of_phases: [1.0, -1.0], last_phase: 1}", r"every entry of factors\(\) .* must be a positive"),
        ("{of_phases: [1.0], last_phase: -1}", "must be a place in its factors.., 0 .. 0, got -1"),
    ],
)
def test_phases_that_are_none_are_refused(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(f"query={{name: '{HERE}:Phased', options: {options}}}"))


def test_factors_and_a_schedule_of_noise_are_not_both_followed() -> None:
    """One of them would be left out without a word."""
    query = f"query={{name: '{HERE}:Phased', options: {{of_phases: [0.5]}}}}"
    with pytest.raises(InputError, match="says itself what noise its steps have"):
        prepare(small(query, "noise={name: schedule, options: {factors: [2.0, 1.0]}}"))


@pytest.mark.parametrize("multiplier", [-3.0, math.inf, 0.0])
def test_noise_multipliers_of_parts_are_positive_numbers(multiplier: float) -> None:
    query = f"query={{name: '{HERE}:Split', options: {{multiplier: {multiplier}}}}}"
    with pytest.raises(InputError, match="every noise multiplier of a query's parts must be a positive"):
        prepare(small(query.replace("inf", ".inf")))


@dataclass(frozen=True)
class Split(Gradient):
    """Gradients with a noise multiplier that the options say."""

    multiplier: float = 1.0

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        return (self.multiplier,)


SOLVED = ("preset=dp_ls", "model.name=linear", "train.steps=1", "train.expected_batch_size=400")
SOLVED += ("optimizer.name=sgd", "optimizer.options={}", "optimizer.learning_rate=1.0")


@pytest.mark.parametrize("strategy", ["central", "shares", "local"])
def test_parts_go_by_their_names(strategy: str, tmp_path: Path) -> None:
    """Whatever their order: else one part would have the bound and noise of another."""
    train(small(*SOLVED, f"strategy={strategy}"), tmp_path / "own")
    train(small(*SOLVED, f"strategy={strategy}", f"query={HERE}:LabelsFirst"), tmp_path / "other")
    assert torch.equal(final(tmp_path / "own"), final(tmp_path / "other"))
    for wrong in ("LabelsAlone", "InSinglePrecision"):
        with pytest.raises(RunError, match=r"must sum up first .*, second .*, as its statistic says"):
            train(small(*SOLVED, f"strategy={strategy}", f"query={HERE}:{wrong}"), tmp_path / wrong)


@dataclass(frozen=True)
class TwiceAsLong(FlatClip):
    """Clips to twice what it states."""

    def coefficients(self, norms: Tensor) -> Tensor:
        return 2 * super().coefficients(norms)


@dataclass(frozen=True)
class Careless(FlatClip):
    """Gives no zero where a norm is not finite."""

    def coefficients(self, norms: Tensor) -> Tensor:
        return (self.clip_norm / norms).clamp(max=1.0)


@dataclass(frozen=True)
class WholeInEveryGroup(PerLayerClip):
    """Clips every layer to the whole bound, and states that of all together."""

    def coefficients(self, norms: Tensor) -> Tensor:
        return FlatClip(self.clip_norm).coefficients(norms)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("TwiceAsLong", r"at most 0\.5 long, but makes it 1 "),
        ("Careless", "0 where a norm is not finite"),
        ("WholeInEveryGroup", r"at most 0\.5 long, but makes it 0\.707"),
    ],
)
def test_a_rule_after_which_contributions_are_longer_than_it_says_is_refused(rule: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(f"privacy.clipping={HERE}:{rule}"))


@pytest.mark.parametrize("rule", ["flat", "normalised", "per_layer"])
def test_rules_that_keep_their_bound_pass_the_trial(rule: str) -> None:
    prepare(small(f"privacy.clipping={rule}"))
    prepare(small(f"privacy.clipping={rule}", "privacy.clip_norm=1e-8"))


@dataclass(frozen=True)
class Shorter(Sgd):
    def updated(self, params: Tensor, gradient: Tensor, slots: Any, step: Any) -> Tensor:
        return super().updated(params, gradient, slots, step)[1:]


@dataclass(frozen=True)
class InPlace(Sgd):
    def updated(self, params: Tensor, gradient: Tensor, slots: Any, step: Any) -> Tensor:
        return params.sub_(gradient)


@dataclass(frozen=True)
class NoSuchSlot(Sgd):
    def updated(self, params: Tensor, gradient: Tensor, slots: Any, step: Any) -> Tensor:
        return params - slots["velocity"]


def made_by_a_function(rate: float = 1.0) -> Sgd:
    return Sgd()


def no_number(progress: float) -> Any:
    return "much"


def dice(images: Any, words: Any) -> Any:
    """Draws from a generator of its own."""
    out = np.repeat(images, words.shape[1], axis=1)
    return out ^ DICE.integers(0, 256, out.shape).astype(np.uint8)


DICE = np.random.default_rng(1)


def neighbour(images: Any, words: Any) -> Any:
    """Looks at the other examples of the batch."""
    return np.repeat(np.minimum(images, images[:1]), words.shape[1], axis=1)


def as_floats(images: Any, words: Any) -> Any:
    return np.repeat(images / 2, words.shape[1], axis=1)


def honest(images: Any, words: Any) -> Any:
    return 255 - images


@dataclass(frozen=True)
class OneForAll(Classification):
    """Its loss is a mean over the batch."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets).mean()


@dataclass(frozen=True)
class OfEverybody(Classification):
    """Its loss is one number an example, the same for all of a batch."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets).mean().expand(len(targets))


@dataclass(frozen=True)
class Promising(Classification):
    """Declares a metric that it does not give."""

    own_metrics = (Metric("profit"),)


def two_arguments(outputs: Tensor) -> Tensor:
    return outputs[:, 0]


class Half:
    """A class that is no gauge."""

    def add(self, outputs: Tensor, targets: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("optimizer.name={here}:Shorter", "must give parameters torch.float32"),
        ("optimizer.name={here}:InPlace", "leave those it gets"),
        ("optimizer.name={here}:NoSuchSlot", "fails by KeyError: 'velocity'"),
        ("optimizer.schedule={here}:no_number", "schedule .*no_number fails by ValueError"),
        ("train.augmentations=[{here}:dice]", "when they come in another order"),
        ("train.augmentations=[{here}:neighbour]", "when they come in another order"),
        ("train.augmentations=[{here}:as_floats]", "must give uint8 views"),
        ("train.augmentations=[{here}:no_number]", "augmentation .*no_number fails by TypeError"),
        ("task={here}:OneForAll", "loss of task OneForAll must be one number an example"),
        ("task={here}:OfEverybody", "loss of task OfEverybody must be of one example alone"),
        ("task={here}:Promising", "must give all of own_metrics, but not profit"),
        ("task.options.metrics=[{here}:two_arguments]", "metric two_arguments fails by TypeError"),
        ("task.options.metrics=[{here}:Half]", "classes with methods add"),
        ("privacy.accountant={here}:NoPair", r"must answer with \(epsilon, note\)"),
        ("privacy.accountant={here}:WithOptions", "missing a required argument: 'orders'"),
    ],
)
def test_a_part_that_breaks_its_contract_is_refused_by_name_before_anything_starts(
    settings: str, message: str
) -> None:
    changes = [settings.format(here=HERE)]
    if "optimizer.name" in settings:
        changes.append("optimizer.options={}")
    with pytest.raises(InputError, match=message):
        _planned(small(*changes))


def _planned(config: Config) -> None:
    epsilons(prepare(config).mechanism, 1, config)


def test_parts_that_keep_their_contract_pass() -> None:
    prepare(small(f"train.augmentations=[{HERE}:honest]"))
    plan = describe(small(f"optimizer.name={HERE}:made_by_a_function", "optimizer.options={rate: 2.0}"))
    assert plan["memory_bytes_without_data_and_libraries"]["server"] > 0


@dataclass(frozen=True)
class NoPair(Pld):
    def epsilon(self, parts: Any, delta: float, tolerance: float = 0.0) -> Any:
        return 1.0


@dataclass(frozen=True)
class WithOptions(Pld):
    orders: int = field()


def test_multipliers_that_are_not_one_a_part_are_refused() -> None:
    with pytest.raises(InputError, match=r"TwoMultipliers splits .* for \['sum'\]"):
        prepare(small(f"query={HERE}:TwoMultipliers"))
