"""Noise and steps follow the events of the strategy's own plan, whoever wrote the strategy."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import rdp

from fedsim import strategies
from fedsim.engine.experiment import prepare
from fedsim.noise.gaussian import GaussianNoise
from fedsim.privacy import accountant, ledger
from fedsim.privacy.budget import Budget, within_budget
from fedsim.privacy.family import EventFamily
from fedsim.privacy.levels import NoiseLevels
from fedsim.strategies.base import Plan
from fedsim.strategies.central_dpsgd import CentralDPSGD
from fedsim.study.plan import describe
from fedsim.validate import InputError
from tests.conftest import small, train
from tests.strategies.test_contract import FORMS, PRIVATE, of

DELTA = 1e-5


def two_gaussians(noise_multiplier: float) -> dp.DpEvent:
    """A step that releases the sum over everybody, and something else with twice the noise."""
    return dp.ComposedDpEvent([dp.GaussianDpEvent(factor * noise_multiplier) for factor in (1, 2)])


class Outside(CentralDPSGD):
    """Everybody takes part in every step: no event of this strategy is Poisson sampled."""

    def selected(self, task: Any, ids: Any) -> Any:
        return np.ones(len(ids), dtype=np.bool_)

    def budget(self, facts: Any) -> Budget:
        return within_budget(self.config.privacy, EventFamily(two_gaussians), self.config.train.steps)

    def plan(self, facts: Any) -> Plan:
        budget, clip = self.budget(facts), self.clip_rule()
        noise = GaussianNoise(budget.noise_multiplier, clip.sensitivity)
        return Plan("example", 1.0, self.config.train.expected_batch_size, clip, noise, budget)


class Careless(Outside):
    """Calibrates as if examples were drawn, and states what it does."""

    def budget(self, facts: Any) -> Budget:
        rate = self.config.train.expected_batch_size / facts.examples
        steps = self.config.train.steps
        drawn = within_budget(self.config.privacy, EventFamily.gaussian(rate), steps)
        return Budget(EventFamily(two_gaussians), drawn.noise_multiplier, drawn.steps)


def installed(cls: type[Any], monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("fedsim.strategies.outside")
    module.STRATEGY = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedsim.strategies.outside", module)
    monkeypatch.setattr(strategies, "names", lambda: ["outside"])
    return "strategy.name=outside"


def spent(noise_multiplier: float, steps: int) -> float:
    """Epsilon of that many steps of the outside strategy, by the library's own accountant."""
    return float(rdp.RdpAccountant().compose(two_gaussians(noise_multiplier), steps).get_epsilon(DELTA))


TARGET = ("privacy.noise_multiplier=null", "privacy.target_epsilon=8", "privacy.accountant=rdp")


def test_a_strategy_with_its_own_event_is_calibrated_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(installed(Outside, monkeypatch), *TARGET)
    plan = prepare(config).plan
    assert 7.99 < spent(plan.budget.noise_multiplier, 6) <= 8.0
    result = train(config, tmp_path)
    assert 7.99 < result["epsilon"]["example"]["value"] <= 8.0
    view = ledger.read(tmp_path / "ledger.jsonl")
    assert [record.event for record in view.records] == [two_gaussians(plan.budget.noise_multiplier)] * 6
    assert view.epsilon().value == result["epsilon"]["example"]["value"]
    assert describe(config)["epsilon"]["example"]["value"] == result["epsilon"]["example"]["value"]
    assert json.loads((tmp_path / "result.json").read_text())["epsilon"] == result["epsilon"]


def test_a_strategy_with_its_own_event_stops_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = installed(Outside, monkeypatch)
    long = ("train.steps=300", "privacy.noise_multiplier=10", "privacy.accountant=rdp")
    plan = prepare(small(name, *long, "privacy.stop_at_epsilon=3")).plan
    assert plan.stopped_by_budget
    assert spent(10.0, plan.steps) <= 3.0 < spent(10.0, plan.steps + 1)


@pytest.mark.parametrize("limit", ["privacy.target_epsilon", "privacy.stop_at_epsilon"])
def test_a_plan_that_spends_more_than_it_may_is_refused(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = installed(Careless, monkeypatch)
    noise = "null" if "target" in limit else "1"
    config = small(name, f"privacy.noise_multiplier={noise}", f"{limit}=8", "train.steps=6")
    for make in (prepare, describe):
        with pytest.raises(InputError, match=rf"{limit} is 8, but the strategy's plan releases epsilon \d\d"):
            make(config)


@pytest.mark.parametrize("name", [*PRIVATE, *FORMS])
def test_the_target_is_met_by_what_the_plan_releases(name: str) -> None:
    config = of(name, *TARGET[:2], "privacy.accountant=rdp")
    plan = prepare(config).plan
    reached = accountant.epsilon(plan.total_event(plan.steps), DELTA, "rdp", plan.unit).value
    assert reached is not None
    assert 7.98 < reached <= 8.0


def test_a_budget_that_cannot_be_computed_says_so() -> None:
    config = small("privacy.stop_at_epsilon=50", "privacy.delta=1e-12")
    with pytest.raises(InputError, match=r"single release .* cannot be computed by the pld .*accountant=rdp"):
        prepare(config)
    assert prepare(small("privacy.stop_at_epsilon=50", "privacy.delta=1e-12", "privacy.accountant=rdp"))


def test_factors_that_change_within_a_release_are_refused() -> None:
    with pytest.raises(InputError, match="covers 3 steps"):
        EventFamily(lambda sigma: dp.GaussianDpEvent(sigma), 3, NoiseLevels((1.0, 2.0), 6))
