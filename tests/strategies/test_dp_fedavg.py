"""DP-FedAvg beyond the contract: what holders send, adaptive clipping, and both units of privacy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dp_accounting import pld, rdp

from fedsim.data import examples
from fedsim.engine.experiment import epsilons, prepare
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.grads.flat import get_flat, set_flat
from fedsim.noise.stream import Stream
from fedsim.queries import Means
from fedsim.strategies.base import Collected
from fedsim.validate import InputError, RunError
from fedsim.visibility import shown
from tests.conftest import final, small, train

ADAPTIVE = ["query.options.target_quantile=0.5", "query.options.count_noise=2.0"]


def fedavg(*more: str) -> Any:
    return small("preset=dp_fedavg", "model.name=linear", *more)


def test_one_step_equals_clipped_local_training_written_out(tmp_path: Path) -> None:
    config = fedavg(
        "model.dtype=float64",
        "train.expected_batch_size=400",
        "train.steps=1",
        "privacy.noise_multiplier=1e-12",
        "privacy.clip_norm=0.02",
        "optimizer.name=sgd",
        "optimizer.learning_rate=1.0",
        "query.options.local_epochs=2",
        "query.options.local_batch_size=1000",
        "query.options.local_learning_rate=0.05",
    )
    train(config, tmp_path)
    experiment = prepare(config)
    data, model = experiment.splits.train, experiment.model
    start = get_flat(model)
    total, clipped = torch.zeros_like(start), 0
    for holder in range(10):  # q = 1: everyone takes part
        ids = np.flatnonzero(experiment.partition.holder_of == holder)
        inputs = examples.normalise(data.inputs[ids], data, torch.float64)
        labels = torch.from_numpy(data.targets[ids])
        set_flat(model, start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        update = get_flat(model) - start
        clipped += int(update.norm() > 0.02)
        total += update * min(1.0, 0.02 / (float(update.norm()) + 1e-6))
    assert clipped > 0, "the clip must matter"
    set_flat(model, start + total / 10)
    expected = model.state_dict()
    assert torch.allclose(
        final(tmp_path), torch.cat([expected[k].flatten() for k in sorted(expected)]), atol=1e-9
    )


def test_both_units_and_twice_the_sensitivity_for_an_example() -> None:
    config = fedavg("train.steps=20")
    experiment = prepare(config)
    spent = shown(epsilons(experiment.mechanism, 20, config), public_only=False)
    assert spent["holder"].unit == "holder"
    assert spent["example"].value > spent["holder"].value, (
        "changing an example may turn its holder's update round"
    )
    assert spent["holder_check"].accountant == "rdp"


@pytest.mark.parametrize("count_noise", [1.0, 2.0, 10.0])
def test_sum_and_count_together_spend_the_stated_multiplier(count_noise: float) -> None:
    config = fedavg("query.options.target_quantile=0.5", f"query.options.count_noise={count_noise}")
    stds = prepare(config).mechanism.release().noise_stds
    assert stds["below"] == count_noise
    multiplier = stds["sum"] / config.privacy.clip_norm
    assert multiplier**-2 + (2 * count_noise) ** -2 == pytest.approx(1.0**-2)
    assert multiplier > 1.0


@pytest.mark.exact
@pytest.mark.parametrize(("sigma", "batch", "steps"), [(1.0, 60, 20), (0.7, 4, 200), (3.0, 400, 5)])
def test_epsilon_of_a_holder_is_that_of_dp_accounting(sigma: float, batch: float, steps: int) -> None:
    """The holder-level event against dp_accounting's own accountants, called directly; also with adaptive
    clipping, whose count is paid for out of the same multiplier."""
    more = (f"privacy.noise_multiplier={sigma}", f"train.expected_batch_size={batch}", f"train.steps={steps}")
    rate = batch / 400  # of holders: everybody's examples together are 400
    gaussian = dp.GaussianDpEvent(sigma)
    one = gaussian if rate == 1.0 else dp.PoissonSampledDpEvent(rate, gaussian)
    for options in ([], ADAPTIVE):
        config = fedavg(*more, *options)
        experiment = prepare(config)
        assert experiment.mechanism.sampling_rate == rate
        spent = shown(epsilons(experiment.mechanism, steps, config), public_only=False)
        renyi = rdp.RdpAccountant().compose(one, steps).get_epsilon(1e-5)
        assert spent["holder_check"].value == pytest.approx(renyi, rel=1e-6)
        losses = pld.PLDAccountant(value_discretization_interval=1e-3).compose(one, steps)
        assert spent["holder"].value == pytest.approx(losses.get_epsilon(1e-5), rel=5e-3)
        assert spent["holder"].value <= renyi


def test_two_releases_compose_to_the_stated_one() -> None:
    """Sum and count of adaptive clipping as two Gaussian releases: epsilon of the one that is recorded."""
    config = fedavg("query.options={target_quantile: 0.5, count_noise: 1.5}")
    multiplier = prepare(config).mechanism.release().noise_stds["sum"] / config.privacy.clip_norm
    both = dp.ComposedDpEvent(
        [dp.GaussianDpEvent(multiplier), dp.GaussianDpEvent(2 * 1.5)]
    )  # the centred count has sensitivity 1/2
    whole = rdp.RdpAccountant().compose(both).get_epsilon(1e-5)
    assert whole == pytest.approx(rdp.RdpAccountant().compose(dp.GaussianDpEvent(1.0)).get_epsilon(1e-5))


def test_count_noise_that_alone_overspends_is_refused() -> None:
    with pytest.raises(InputError, match="count_noise"):
        prepare(fedavg("query.options.target_quantile=0.5", "query.options.count_noise=0.4"))


@pytest.mark.parametrize("name", ["central_dpsgd", "local_dpsgd", "shares_dpsgd", "dp_ftrl", "dp_mf"])
def test_adaptive_clipping_is_refused_where_no_event_covers_it(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown key 'target_quantile'"):
        prepare(small(f"preset={name}", "query.options={target_quantile: 0.5}"))
    with pytest.raises(InputError, match=r"privacy.clipping must be one of"):
        prepare(small(f"preset={name}", "privacy.clipping=adaptive"))


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_clip_norm_finds_the_quantile(quantile: float) -> None:
    config = fedavg(
        f"query.options.target_quantile={quantile}",
        "query.options.count_noise=2.0",
        "federation.holders=400",
        "train.expected_batch_size=400",
    )
    mechanism = prepare(config).mechanism
    query = mechanism.method.at.query
    norms = np.random.Generator(np.random.Philox(key=3)).lognormal(1.0, 0.7, 400)
    state = query.state(config)

    def clip_norm() -> float:
        return float(query.arrays(state)["clip_norm"][0])

    for step in range(150):
        release = mechanism.release(0, state)
        below = np.array([float((norms <= clip_norm()).sum() - 200)])
        sums = {"sum": np.zeros(release.statistic.main.length), "below": below}
        noise = mechanism.noise(release, Collected(sums, []), Stream(), b"r" * 32, step)
        state = query.updated(
            state, Means({"below": (below + noise["below"]) / mechanism.divisor}, "sum", {})
        )
    assert abs(float((norms <= clip_norm()).mean()) - quantile) < 0.05


def test_adaptive_clip_norm_survives_a_resume(tmp_path: Path) -> None:
    def stop(message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train" and wire.unpack_task(message.content)[0].step == 5:
            raise OSError("stopped here")
        return app(message, context)

    client: Callable[..., Any] = stop
    with pytest.raises(RunError):
        train(fedavg(*ADAPTIVE), tmp_path / "a", client=client)
    train(fedavg(*ADAPTIVE), tmp_path / "a", resume=True)
    train(fedavg(*ADAPTIVE), tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            ["strategy=shares"],
            "target_quantile does not go with strategy=shares: the bound would follow a count",
        ),
        (["strategy=nonprivate", "privacy.noise_multiplier=null"], "does not go with strategy=nonprivate"),
    ],
)
def test_a_moving_bound_needs_a_server_that_counts(others: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(fedavg(*ADAPTIVE, *others, *(["privacy.clip_norm=1.0"] if "null" in others[-1] else [])))


@pytest.mark.parametrize(
    "others", [["sampler=passes", "noise=tree"], ["noise={name: schedule, options: {factors: [2.0, 1.0]}}"]]
)
def test_a_moving_bound_goes_with_fresh_noise_only(others: list[str]) -> None:
    with pytest.raises(InputError, match=r"target_quantile.*noise=independent"):
        prepare(fedavg(*ADAPTIVE, *others))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.augment_multiplicity=2", "augment"),
        ("privacy.clipping=normalised", "clips updates flat"),
        ("query.options.local_epochs=0", "local_epochs"),
        ("query.options.target_quantile=1.5", "target_quantile"),
        ("query.options={target_quantile: 0.5, count_noise: 0}", "an exact count has no event"),
        ("query.options={target_quantile: 0.5, count_noise: -1}", "count_noise .* must be a positive"),
        ("query.options.count_noise=2", "nothing reads it while .*target_quantile is None"),
    ],
)
def test_refusals(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(fedavg(change))
