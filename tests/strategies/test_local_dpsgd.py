"""local_dpsgd with several local steps: what holders send, what it costs, what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
import torch
from dp_accounting import rdp

from fedsim.config import Config
from fedsim.data import examples
from fedsim.engine.experiment import epsilons, prepare
from fedsim.engine.holder import Node
from fedsim.grads.flat import get_flat, set_flat
from fedsim.noise.gaussian import standard_normal
from fedsim.privacy import accountant, ledger
from fedsim.samplers.keyed import HolderAvailability, PoissonSampler
from fedsim.seeds import derive
from fedsim.strategies.local import Local
from fedsim.types import StepTask
from fedsim.validate import InputError
from fedsim.visibility import shown
from tests.conftest import final, small, train

DELTA = 1e-5


def silo(*more: str, steps: int = 3, rate: float = 0.5) -> Config:
    options = f"strategy.options={{local_steps: {steps}, local_learning_rate: {rate}}}"
    return small("preset=local_dpsgd", "model.name=linear", options, *more)


ONE_STEP = (
    "model.dtype=float64",
    "train.steps=1",
    "train.expected_batch_size=120",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.7",
)


def written_out(config: Config, clip_norm: float, noise_std: float) -> torch.Tensor:
    """One server step by hand: DP-SGD at every holder with autograd, one example at a time, then the mean of
    the local models; for sgd. Returns the parameters, sorted by name."""
    experiment = prepare(config)
    data, model = experiment.splits.train, experiment.model
    options, federation = experiment.mechanism.method.trust, config.federation
    assert isinstance(options, Local)
    root = derive(config.seed, "run")
    rate, start = experiment.mechanism.sampling_rate, get_flat(model)
    online = np.ones(federation.holders, dtype=bool)
    if federation.availability < 1.0:
        key = derive(root, "availability", 0)
        online = HolderAvailability(federation.availability).available(np.arange(federation.holders), key)
    per_local_step = config.train.expected_batch_size / (federation.holders * federation.availability)
    moves = []
    for holder in np.flatnonzero(online).tolist():
        local = start.clone()
        for e in range(options.local_steps):
            draw, noise = derive(root, "draw", 0), derive(root, "holders", 0)
            if e:
                draw, noise = derive(draw, "local step", e), derive(noise, "local step", e)
            ids = np.flatnonzero(experiment.partition.holder_of == holder)
            ids = ids[PoissonSampler(rate, 400).included(ids, draw)]
            set_flat(model, local)
            total = torch.zeros_like(start)
            for i in ids:
                inputs = examples.normalise(data.inputs[i : i + 1], data, torch.float64)
                loss = torch.nn.functional.cross_entropy(model(inputs), torch.tensor([int(data.targets[i])]))
                gradient = torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
                )
                total += gradient * min(1.0, clip_norm / (float(gradient.norm()) + 1e-6))
            total += noise_std * torch.from_numpy(
                standard_normal(derive(noise, "local noise", holder), len(start))
            )
            local = local - options.local_learning_rate * total / per_local_step
        moves.append(local - start)
    mean_of_expected = torch.stack(moves).sum(0) / (federation.holders * federation.availability)
    set_flat(model, start + config.optimizer.learning_rate * mean_of_expected)
    state = model.state_dict()
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.mark.parametrize("availability", [1.0, 0.6])
@pytest.mark.parametrize("noise_multiplier", [1e-14, 1.0])
def test_one_step_equals_local_dp_sgd_written_out(
    availability: float, noise_multiplier: float, tmp_path: Path
) -> None:
    """With noise, and without any to speak of: then it is plain local training with clipping."""
    config = silo(
        *ONE_STEP, f"federation.availability={availability}", f"privacy.noise_multiplier={noise_multiplier}"
    )
    train(config, tmp_path)
    expected = written_out(config, 0.5, 0.5 * noise_multiplier)
    assert torch.allclose(final(tmp_path), expected, atol=1e-10)


def test_vanishing_noise_and_clipping_is_plain_local_sgd(tmp_path: Path) -> None:
    config = silo(*ONE_STEP, "privacy.clip_norm=1e4", "privacy.noise_multiplier=1e-14")
    train(config, tmp_path)
    assert torch.allclose(final(tmp_path), written_out(config, math.inf, 0.0), atol=1e-9)


def test_one_local_step_and_full_local_rate_are_the_same_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two forms meet at E = 1: the path of several steps, forced, gives what one noised sum gives."""
    config = small("preset=local_dpsgd", "model.dtype=float64", "federation.availability=0.7",
                   "train.expected_batch_size=40")  # fmt: skip
    train(config, tmp_path / "a")

    def forced(self, at, node, task):  # type: ignore[no-untyped-def]
        result = self._trained(at, node, task)
        return {"sum": result.sum.numpy()}, result

    monkeypatch.setattr(Local, "answer", forced)
    train(config, tmp_path / "b")
    assert torch.allclose(final(tmp_path / "a"), final(tmp_path / "b"), atol=1e-10)


@pytest.mark.exact
def test_the_event_is_every_local_release_and_epsilon_that_of_dp_accounting(tmp_path: Path) -> None:
    config = silo()
    experiment = prepare(config)
    train(config, tmp_path)
    view = ledger.read(tmp_path / "ledger.jsonl")
    q, sigma = 60 / 400, 1.0
    one = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(sigma))
    assert [record.event for record in view.records] == [dp.SelfComposedDpEvent(one, 3)] * 6
    reference = rdp.RdpAccountant().compose(one, 18).get_epsilon(DELTA)
    spent = shown(epsilons(experiment.mechanism, 6, config), public_only=False)
    assert spent["example_check"].value == pytest.approx(reference, rel=1e-6)
    assert view.epsilon().value == spent["example"].value
    once = prepare(small("preset=local_dpsgd", "model.name=linear", "train.steps=18"))
    assert spent["example"].value == accountant.epsilon(once.mechanism.total_event(18), DELTA).value
    holder = accountant.holder_epsilon(sigma, q, 18, DELTA, experiment.facts.largest_holder.value)
    assert spent["holder"].value == holder.value
    assert holder.value is not None
    assert spent["example"].value is not None
    assert holder.value > spent["example"].value


def test_calibration_and_budget_count_local_steps() -> None:
    plan = prepare(silo("privacy.noise_multiplier=null", "privacy.target_epsilon=3")).mechanism
    reached = accountant.epsilon(plan.total_event(plan.steps), DELTA).value
    assert reached is not None
    assert 2.999 < reached <= 3.0
    single = prepare(silo("privacy.stop_at_epsilon=4", "train.steps=200", steps=1, rate=1.0)).mechanism
    plan = prepare(silo("privacy.stop_at_epsilon=4", "train.steps=200", steps=5)).mechanism
    assert plan.stopped_by_budget
    assert plan.steps == single.steps // 5
    with pytest.raises(InputError, match=r"4.0 is below the epsilon of a single release: .* step is \d"):
        prepare(silo("privacy.stop_at_epsilon=4", steps=190))


def test_the_result_does_not_depend_on_nodes_or_physical_batch(tmp_path: Path) -> None:
    base = ("model.dtype=float64", "federation.availability=0.8", "train.steps=3")
    train(silo(*base), tmp_path / "a")
    train(silo(*base, "federation.nodes=5", "engine.physical_batch_size=3"), tmp_path / "b")
    assert torch.allclose(final(tmp_path / "a"), final(tmp_path / "b"), atol=1e-10)


def test_local_steps_draw_anew_and_leave_the_model_where_it_was() -> None:
    config = silo("train.augment_multiplicity=2", "train.augmentations=[flip]", "model.dtype=float64")
    node = Node(config, 0, config.seed)
    task = StepTask(0, 0, 0.3, node.method.keys(1, 0), arrays={"noise_std of sum": np.array([0.5])})
    before = get_flat(node.model)
    first = node.method.answer(node, task)
    assert torch.equal(get_flat(node.model), before)
    again = node.method.answer(node, task)
    assert np.array_equal(first[0]["sum"], again[0]["sum"]), "a repeated task repeats its message"
    drawn = [node.drawn(dataclasses.replace(task, keys=node.method.keys(1, 0)))]
    assert first[1].count != 3 * len(drawn[0]), "three draws, not one draw three times"
    assert first[1].count == len(first[1].norms) == len(first[1].losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("local_steps: 0", "local_steps must be a positive"),
        ("local_steps: 2, local_learning_rate: 0", "local_learning_rate must be a positive"),
        ("local_learning_rate: 0.5", "would only scale optimizer.learning_rate"),
        ("local_epochs: 2", "unknown key"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small("preset=local_dpsgd", f"strategy.options={{{options}}}"))
