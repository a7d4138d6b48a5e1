"""Noise and steps follow the events of the mechanism, whoever wrote its parts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import rdp

from fedsim.config import Config
from fedsim.engine.experiment import prepare
from fedsim.noise.levels import NoiseLevels
from fedsim.privacy import ledger
from fedsim.privacy.budget import Budget, within_budget
from fedsim.privacy.family import EventFamily
from fedsim.queries.gradient import Gradient
from fedsim.samplers import Participation, Sampler
from fedsim.strategies.base import Agreed, Setting
from fedsim.strategies.central import Central
from fedsim.study.plan import describe
from fedsim.validate import InputError
from tests.conftest import small, train

DELTA = 1e-5


def two_gaussians(noise_multiplier: float) -> dp.DpEvent:
    """A step that releases the sum over everybody, and something else with twice the noise."""
    return dp.ComposedDpEvent([dp.GaussianDpEvent(factor * noise_multiplier) for factor in (1, 2)])


@dataclass(frozen=True)
class Everybody(Sampler):
    """All units in every step."""

    def participation(self, share: float, batch: float, units: int) -> Participation:
        return Participation(1, 1.0, 1, share)

    def selected(self, draw: Any, ids: Any) -> Any:
        return np.ones(len(ids), dtype=np.bool_)


@dataclass(frozen=True)
class Outside(Central):
    """A step that releases the sum over everybody, and something else beside it."""

    def event(self, at: Setting, noise_multiplier: float, rate: float) -> dp.DpEvent:
        return two_gaussians(noise_multiplier)


@dataclass(frozen=True)
class Careless(Outside):
    """Calibrates as if examples were drawn, and states what it does."""

    def agree(self, at: Setting, family: EventFamily, phases: Any, split: Any, facts: Any) -> Agreed:
        rate = at.config.train.expected_batch_size / facts.examples
        drawn = within_budget(at.config.privacy, EventFamily.gaussian(rate), at.config.train.steps)
        budget = Budget(family, drawn.noise_multiplier, drawn.steps)
        return Agreed(budget, (drawn.noise_multiplier,), (None,))


HERE = "tests.strategies.test_calibration"


def of_outside(cls: type[Any], *overrides: str) -> Config:
    return small(f"strategy={HERE}:{cls.__name__}", f"sampler={HERE}:Everybody", *overrides)


def spent(noise_multiplier: float, steps: int) -> float:
    """Epsilon of that many steps of the outside strategy, by the library's own accountant."""
    return float(rdp.RdpAccountant().compose(two_gaussians(noise_multiplier), steps).get_epsilon(DELTA))


TARGET = ("privacy.noise_multiplier=null", "privacy.target_epsilon=8", "privacy.accountant=rdp")


@pytest.mark.exact
def test_a_trust_model_with_its_own_event_is_calibrated_by_it(tmp_path: Path) -> None:
    config = of_outside(Outside, *TARGET)
    plan = prepare(config).mechanism
    assert 7.99 < spent(plan.budget.noise_multiplier, 6) <= 8.0
    result = train(config, tmp_path)
    assert 7.99 < result["epsilon"]["example"]["value"] <= 8.0
    view = ledger.read(tmp_path / "ledger.jsonl")
    assert [record.event for record in view.records] == [two_gaussians(plan.budget.noise_multiplier)] * 6
    assert view.epsilon().value == result["epsilon"]["example"]["value"]
    assert describe(config)["epsilon"]["example"]["value"] == result["epsilon"]["example"]["value"]
    assert json.loads((tmp_path / "result.json").read_text())["epsilon"] == result["epsilon"]


def test_a_trust_model_with_its_own_event_stops_by_it() -> None:
    long = ("train.steps=300", "privacy.noise_multiplier=10", "privacy.accountant=rdp")
    plan = prepare(of_outside(Outside, *long, "privacy.stop_at_epsilon=3")).mechanism
    assert plan.stopped_by_budget
    assert spent(10.0, plan.steps) <= 3.0 < spent(10.0, plan.steps + 1)


@pytest.mark.parametrize("limit", ["privacy.target_epsilon", "privacy.stop_at_epsilon"])
def test_a_mechanism_that_spends_more_than_it_may_is_refused(limit: str) -> None:
    noise = "null" if "target" in limit else "1"
    config = of_outside(Careless, f"privacy.noise_multiplier={noise}", f"{limit}=8", "train.steps=6")
    for make in (prepare, describe):
        with pytest.raises(InputError, match=rf"{limit} is 8, but the mechanism releases epsilon \d\d"):
            make(config)


@dataclass(frozen=True)
class Spendthrift(Gradient):
    """Gives its part half of the noise that it is to have."""

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        return (noise_multiplier / 2,)


def test_a_query_that_takes_more_than_its_noise_is_refused() -> None:
    with pytest.raises(InputError, match="parts that together have less noise"):
        prepare(small(f"query={HERE}:Spendthrift"))


def test_a_budget_that_cannot_be_computed_says_so() -> None:
    config = small("privacy.stop_at_epsilon=50", "privacy.delta=1e-12")
    with pytest.raises(InputError, match=r"single release .* cannot be computed by the pld .*accountant=rdp"):
        prepare(config)
    assert prepare(small("privacy.stop_at_epsilon=50", "privacy.delta=1e-12", "privacy.accountant=rdp"))


def test_factors_that_change_within_a_release_are_refused() -> None:
    with pytest.raises(InputError, match="covers 3 steps"):
        EventFamily(lambda sigma: dp.GaussianDpEvent(sigma), 3, NoiseLevels((1.0, 2.0), 6))
