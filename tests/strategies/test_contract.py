"""What every file in strategies/ must satisfy; a new strategy is picked up by its file name."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fedsim import config as configs
from fedsim import strategies
from fedsim.config import Config
from fedsim.engine.experiment import prepare
from fedsim.flower.client_app import app
from fedsim.privacy import accountant, ledger
from fedsim.strategies.base import DataFacts, Plan
from fedsim.strategies.nonprivate import NonPrivate
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train

ALL = strategies.names()
PRIVATE = [name for name in ALL if strategies.load(configs.load(f"smoke/{name}")).private]


# Forms of a strategy that its options make another mechanism: they must satisfy the same.
FORMS = {
    "local_dpsgd, local steps": "strategy.options={local_steps: 3, local_learning_rate: 0.5}",
    "dp_fedavg, adaptive": "strategy.options={target_quantile: 0.5, count_noise: 2}",
    "shares_dpsgd, top up": "strategy.options={on_shortfall: top_up}",
}


def of(name: str, *overrides: str) -> Config:
    """The small configuration under a strategy, or under a form of one."""
    strategy, form = name.split(",")[0], [FORMS[name]] if name in FORMS else []
    noise = [] if strategy in PRIVATE else ["privacy.noise_multiplier=null", "privacy.clip_norm=1.0"]
    return small(f"strategy.name={strategy}", *form, *noise, *overrides)


class Flaky:
    """A ClientApp whose node 1 raises on chosen train messages."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails = fails
        self.asked = 0

    def __call__(self, message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            self.asked += 1
            if self.fails(self.asked):
                raise OSError("disk of this holder is gone")
        return app(message, context)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.Tensor]:
    """The parameters that the small configuration ends in, under a strategy or form, trained once."""

    @functools.cache
    def parameters(name: str) -> torch.Tensor:
        folder = tmp_path_factory.mktemp("unbroken")
        train(of(name), folder)
        return final(folder)

    return parameters


@pytest.mark.parametrize("name", ALL)
def test_says_what_it_trusts(name: str) -> None:
    strategy = strategies.load(configs.load(f"smoke/{name}"))
    for text in (strategy.trusted, strategy.sent, strategy.noise_added, strategy.dropout_policy):
        assert text
    assert type(strategy).__module__ == f"fedsim.strategies.{name}"
    assert "Source:" in (__import__(f"fedsim.strategies.{name}", fromlist=["x"]).__doc__ or "")


def test_every_strategy_has_a_smoke_file_that_names_it() -> None:
    """In the file itself: one that leaves its strategy to the defaults would test another under its name."""
    said = {
        path.stem: OmegaConf.select(OmegaConf.load(path), "strategy.name")
        for path in (configs.CONFIG_DIR / "smoke").glob("*.yaml")
    }
    assert said == {name: name for name in ALL}


@pytest.mark.parametrize("name", [*ALL, "local_dpsgd, local steps"])
def test_learns_on_its_smoke_config(name: str, tmp_path: Path) -> None:
    form = [FORMS[name]] if name in FORMS else []
    quiet = ["monitor.progress=false", "monitor.tensorboard=false"]
    config = configs.load(f"smoke/{name.split(',')[0]}", [*form, *quiet])
    result = train(config, tmp_path)
    assert result["strategy"] == name.split(",")[0]
    assert result["accuracy"] > 0.5, "ten balanced classes: chance is 0.1"


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", PRIVATE)
def test_vanishing_noise_and_clipping_equal_the_noiseless_form(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the strategy's own draws, `nonprivate` in its noiseless form gives the same parameters."""
    loose = ["privacy.clip_norm=1e4", "privacy.noise_multiplier=1e-14", "train.eval_every=1000"]
    config = of(name, "model.dtype=float64", *loose)
    train(config, tmp_path / "private")
    private, rate, own_plan = strategies.load(config), prepare(config).plan.sampling_rate, NonPrivate.plan

    def plan(self: NonPrivate, facts: DataFacts) -> Plan:
        return dataclasses.replace(own_plan(self, facts), sampling_rate=rate)

    monkeypatch.setattr(NonPrivate, "plan", plan)
    monkeypatch.setattr(NonPrivate, "keys", lambda _, root, step: private.keys(root, step))
    monkeypatch.setattr(NonPrivate, "selected", lambda _, task, ids: private.selected(task, ids))
    train(of("nonprivate", "model.dtype=float64", *private.noiseless_form()), tmp_path / "plain")
    assert torch.max(torch.abs(final(tmp_path / "private") - final(tmp_path / "plain"))) <= 1e-9


@pytest.mark.parametrize("name", [*PRIVATE, *FORMS])
def test_event_has_a_finite_epsilon_by_both_accountants(name: str) -> None:
    plan = prepare(of(name)).plan
    for kind in ("pld", "rdp"):
        value = accountant.epsilon(plan.event_at(0), 1e-5, kind, plan.unit).value
        assert value is not None
        assert 0 < value < math.inf


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", [*ALL, *FORMS])
def test_empty_draw_is_an_ordinary_step(name: str, tmp_path: Path) -> None:
    result = train(of(name, "train.expected_batch_size=1e-6", "optimizer.learning_rate=1e-9"), tmp_path)
    assert result["steps"] == 6
    assert ledger.read(tmp_path / "ledger.jsonl").steps == 6
    start = prepare(of(name)).model.state_dict()
    moved = torch.max(torch.abs(final(tmp_path) - torch.cat([start[k].flatten() for k in sorted(start)])))
    assert (moved > 0) == (name != "nonprivate"), "noise is added to an empty sum, and nothing else is"


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", [*ALL, *FORMS])
def test_a_node_that_fails_once_is_asked_again_with_the_same_keys(
    name: str, tmp_path: Path, unbroken: Callable[[str], torch.Tensor]
) -> None:
    train(of(name), tmp_path, client=Flaky(lambda n: n == 3))
    assert torch.equal(final(tmp_path), unbroken(name))


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", [*ALL, *FORMS])
def test_a_node_that_fails_twice_stops_the_run_which_resumes_exactly(
    name: str, tmp_path: Path, unbroken: Callable[[str], torch.Tensor]
) -> None:
    with pytest.raises(RunError, match="disk of this holder is gone"):
        train(of(name), tmp_path, client=Flaky(lambda n: n >= 4))
    assert not (tmp_path / "result.json").exists()
    train(of(name), tmp_path, resume=True)
    assert torch.equal(final(tmp_path), unbroken(name))
    assert ledger.read(tmp_path / "ledger.jsonl").steps == 6


@pytest.mark.usefixtures("epsilon_takes_no_time")
@pytest.mark.parametrize("name", [*PRIVATE, *FORMS])
def test_noise_is_added_once_whatever_the_number_of_holders(name: str, tmp_path: Path) -> None:
    """With no example drawn the update is the noise alone, of the scale the strategy states for its sum."""
    start = prepare(of(name)).model.state_dict()
    origin = torch.cat([start[k].flatten() for k in sorted(start)])
    count = origin.numel()
    for holders in (2, 3, 50):
        out = tmp_path / str(holders)
        config = of(
            name,
            f"federation.holders={holders}",
            f"federation.nodes={min(holders, 4)}",
            "train.expected_batch_size=1e-6",
            "train.steps=1",
            "optimizer.name=sgd",
        )
        prepared = prepare(config)
        plan = prepared.plan
        config = dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, learning_rate=plan.divisor)
        )
        train(config, out)
        noise = (final(out) - origin).double()  # learning rate / divisor = 1: minus the noise on the sum
        stated = prepared.strategy.noise_std_of_sum(plan)
        ratio = float(noise.square().mean()) / stated**2
        assert abs(ratio - 1) < 6 * math.sqrt(2 / count), "false alarm 2e-9; twice the noise gives ratio 4"


def test_unknown_strategy_and_option_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="central_dpsgd"):
        prepare(small("strategy.name=central_dpsg"))
    with pytest.raises(InputError, match="unknown key"):
        prepare(small("strategy.options={zap: 1}"))
