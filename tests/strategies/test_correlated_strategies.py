"""dp_ftrl and dp_mf: who takes part when, what that costs, and that a broken run goes on exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
import torch
from dp_accounting import pld, rdp
from safetensors.torch import load_file

from fedsim.config import Config
from fedsim.engine.experiment import Experiment, epsilons, prepare
from fedsim.engine.holder import Node
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.method import Method
from fedsim.noise.stream import Stream
from fedsim.noise.tree import TreeAggregation
from fedsim.privacy import accountant, events, ledger
from fedsim.types import StepTask
from fedsim.validate import InputError, RunError
from fedsim.visibility import shown
from tests.conftest import final, small, train

BOTH = ("dp_ftrl", "dp_mf")
DELTA = 1e-5


def of(name: str, *overrides: str) -> Config:
    """A linear model on 400 examples; 100 expected in a batch: 4 steps a pass, sampling rate 1/4."""
    return small(f"preset={name}", "model.name=linear", "train.expected_batch_size=100", *overrides)


def tasks(experiment: Experiment, steps: int, root: int = 17) -> list[StepTask]:
    rate, method = experiment.mechanism.sampling_rate, experiment.mechanism.method
    return [StepTask(t, 0, rate, method.keys(root, t)) for t in range(steps)]


def participation(config: Config, steps: int, ids: np.ndarray | None = None) -> np.ndarray:
    """(steps, ids) bool: who takes part, asked of the method as a node would."""
    experiment = prepare(config)
    everyone = np.arange(400) if ids is None else ids
    of_node = Method.of(config)
    return np.stack([of_node.selected(task, everyone, 400) for task in tasks(experiment, steps)])


def test_ftrl_everybody_takes_part_once_in_every_pass() -> None:
    taken = participation(of("dp_ftrl"), 14)
    for begin in (0, 4, 8):
        assert (taken[begin : begin + 4].sum(axis=0) == 1).all()
    assert (taken[12:].sum(axis=0) <= 1).all(), "a pass that is cut short"
    assert (np.argmax(taken[:4], axis=0) != np.argmax(taken[4:8], axis=0)).mean() > 0.6, "new bins every pass"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("holders", [1, 7, 400])
def test_participation_does_not_depend_on_the_partition(name: str, holders: int) -> None:
    config = of(
        name,
        f"federation.holders={holders}",
        f"federation.nodes={min(3, holders)}",
        "federation.partition=iid",
    )
    expected = participation(config, 8)
    nodes = [Node(config, index, config.seed) for index in range(config.federation.nodes)]
    for task, row in zip(tasks(prepare(config), 8), expected, strict=True):
        drawn = np.concatenate([node.drawn(task) for node in nodes])
        assert np.array_equal(np.sort(drawn), np.flatnonzero(row))


def test_mf_everybody_keeps_to_a_group_and_is_drawn_at_rate_q_times_bands() -> None:
    """Binomial(320 steps / 4, 0.15 * 4) for each of 400 examples; six standard deviations, 8e-7 in all."""
    config = of("dp_mf", "train.expected_batch_size=60")
    taken = participation(config, 320)
    groups = np.stack([taken[g::4].any(axis=0) for g in range(4)])
    assert (groups.sum(axis=0) == 1).all(), "with these numbers nobody is never drawn"
    counts = taken.sum(axis=0)
    assert np.abs(counts - 48).max() < 6 * math.sqrt(80 * 0.6 * 0.4)
    assert abs(taken.mean() - 0.15) < 6 * math.sqrt(0.15 * 0.4 / taken.size)
    assert np.abs(groups.sum(axis=1) - 100).max() < 6 * math.sqrt(75)


def test_mf_with_one_band_is_central_dpsgd(tmp_path: Path) -> None:
    one = ("sampler.options={groups: 1}", "noise.options={bands: 1}")
    calibrated = ("privacy.noise_multiplier=null", "privacy.target_epsilon=3")
    results = {
        name: train(of(name, *options, *calibrated), tmp_path / name)
        for name, options in (("dp_mf", one), ("central_dpsgd", ()))
    }
    assert torch.equal(final(tmp_path / "dp_mf"), final(tmp_path / "central_dpsgd"))
    assert results["dp_mf"]["epsilon"] == results["central_dpsgd"]["epsilon"]
    books = [ledger.read(tmp_path / name / "ledger.jsonl").records for name in results]
    assert books[0] == books[1]
    assert torch.equal(
        torch.from_numpy(participation(of("dp_mf", *one), 5)),
        torch.from_numpy(participation(of("central_dpsgd"), 5)),
    )


def test_more_bands_are_another_mechanism(tmp_path: Path) -> None:
    train(of("dp_mf", "sampler.options={groups: 2}"), tmp_path / "two")
    train(of("dp_mf", "sampler.options={groups: 1}", "noise.options={bands: 1}"), tmp_path / "one")
    assert not torch.allclose(final(tmp_path / "two"), final(tmp_path / "one"))


@pytest.mark.parametrize("name", BOTH)
def test_without_noise_it_is_not_the_run_on_poisson_draws(name: str, tmp_path: Path) -> None:
    """That it is the run on its own draws, every combination is asked."""
    noiseless = ["model.dtype=float64", "privacy.noise_multiplier=null", "privacy.clip_norm=1.0"]
    train(of(name, *noiseless, "strategy=nonprivate", "noise=independent"), tmp_path / "own")
    train(of("nonprivate", *noiseless), tmp_path / "poisson")
    assert torch.max(torch.abs(final(tmp_path / "own") - final(tmp_path / "poisson"))) > 1e-3


@pytest.mark.parametrize("name", BOTH)
def test_the_ledger_records_one_release_a_period(name: str, tmp_path: Path) -> None:
    experiment = prepare(of(name))
    result = train(of(name), tmp_path)
    view = ledger.read(tmp_path / "ledger.jsonl")
    kinds = [type(record.event).__name__ for record in view.records]
    first = type(experiment.mechanism.event_at(0)).__name__
    assert kinds == [first, *["NoOpDpEvent"] * 3, first, "NoOpDpEvent"], "the second period is cut short"
    expected = accountant.epsilon(experiment.mechanism.total_event(6), DELTA).value
    assert view.epsilon().value == result["epsilon"]["example"]["value"] == expected


@pytest.mark.exact
def test_ftrl_epsilon_is_that_of_the_trees_in_dp_accounting() -> None:
    """dp_accounting's tree event takes noise over clip norm; four passes, the last cut short.

    It knows the event for replacing an example by an empty one only, as adding one would move those behind
    it in a stream. Here the key places every example by itself, so adding one is the same as that.
    """
    for batch, steps_per_pass in ((100, 4), (57.2, 7), (25, 16), (400, 1)):
        steps = 3 * steps_per_pass + (1 if steps_per_pass > 1 else 0)
        plan = prepare(of("dp_ftrl", f"train.expected_batch_size={batch}", f"train.steps={steps}")).mechanism
        assert plan.budget.family.period == steps_per_pass
        tree = dp.SingleEpochTreeAggregationDpEvent(plan.release().noise_stds["sum"] / 0.5, steps_per_pass)
        passes = -(-steps // steps_per_pass)
        relation = dp.NeighboringRelation.REPLACE_SPECIAL
        reference = rdp.RdpAccountant(neighboring_relation=relation).compose(tree, passes).get_epsilon(DELTA)
        ours = accountant.epsilon(plan.total_event(steps), DELTA, "rdp").value
        assert ours == pytest.approx(reference, rel=1e-9)
        tight = accountant.epsilon(plan.total_event(steps), DELTA, "pld").value
        assert tight is not None
        assert tight <= reference


def test_ftrl_tree_of_a_run_shorter_than_a_pass_has_only_its_own_levels() -> None:
    plan = prepare(of("dp_ftrl", "train.expected_batch_size=4", "train.steps=7")).mechanism
    encoder, _ = TreeAggregation(100).factors(7)
    assert 0.5 * plan.column_norm == pytest.approx(0.5 * np.linalg.norm(encoder, axis=0).max())
    assert 0.5 * plan.column_norm == pytest.approx(0.5 * math.sqrt(3))


@pytest.mark.parametrize("bands", [2, 4])
def test_mf_epsilon_is_that_of_one_amplified_release_a_cycle(bands: int) -> None:
    config = of(
        "dp_mf", f"sampler.options={{groups: {bands}}}", "train.expected_batch_size=40", "train.steps=21"
    )
    plan = prepare(config).mechanism
    reference = pld.PLDAccountant(value_discretization_interval=1e-4)
    cycles = -(-21 // bands)
    reference.compose(dp.PoissonSampledDpEvent(0.1 * bands, dp.GaussianDpEvent(1.0)), cycles)
    ours = accountant.epsilon(plan.total_event(21), DELTA).value
    assert ours == pytest.approx(reference.get_epsilon(DELTA), rel=2e-3)


def test_mf_with_the_whole_group_in_every_draw_takes_no_amplification() -> None:
    plan = prepare(of("dp_mf", "sampler.options={groups: 4}")).mechanism
    assert plan.event_at(0) == dp.GaussianDpEvent(1.0)


@pytest.mark.parametrize("name", BOTH)
def test_calibration_meets_the_target(name: str) -> None:
    target = ("privacy.noise_multiplier=null", "privacy.target_epsilon=2")
    config = of(name, *target, "train.steps=11", "train.expected_batch_size=57.2")
    plan = prepare(config).mechanism
    reached = accountant.epsilon(plan.total_event(plan.steps), DELTA).value
    assert reached is not None
    assert 1.999 < reached <= 2.0
    assert plan.budget.calibration is not None
    assert plan.noise_multiplier == plan.budget.calibration.noise_multiplier


@pytest.mark.parametrize("name", BOTH)
def test_the_budget_ends_a_run_at_the_end_of_a_release(name: str) -> None:
    long = ("train.steps=50", "privacy.noise_multiplier=4")
    one = accountant.epsilon(prepare(of(name, *long)).mechanism.event_at(0), DELTA).value
    assert one is not None
    plan = prepare(of(name, *long, f"privacy.stop_at_epsilon={2 * one}")).mechanism
    assert plan.stopped_by_budget
    assert plan.steps % 4 == 0
    spent = accountant.epsilon(plan.total_event(plan.steps), DELTA).value
    more = accountant.epsilon(plan.total_event(plan.steps + 1), DELTA).value
    assert spent is not None
    assert more is not None
    assert spent <= 2 * one < more
    with pytest.raises(InputError, match="single release"):
        prepare(of(name, *long, f"privacy.stop_at_epsilon={one / 2}"))


def test_ftrl_holder_epsilon_bounds_every_way_its_examples_can_fall() -> None:
    """The shift of a tree by m examples, wherever they are, is at most what the event is scaled by."""
    plan = prepare(of("dp_ftrl", "train.expected_batch_size=50", "train.steps=16")).mechanism
    tree = TreeAggregation(8)
    encoder, _ = tree.factors(16)
    generator = np.random.Generator(np.random.Philox(key=1))
    for m in (1, 2, 5, 40):
        for _ in range(200):
            at = generator.multinomial(m, np.full(8, 1 / 8))
            assert np.linalg.norm(encoder[:, :8] @ at) <= m * tree.column_norm(16) * (1 + 1e-12)
        together = accountant.holder_epsilon_of_event(plan.total_event_for_holder(16, m), DELTA, m).value
        direct = accountant.epsilon(events.composed(dp.GaussianDpEvent(1.0 / m), 2), DELTA).value
        assert together == pytest.approx(direct)


def test_mf_holder_bound_covers_draws_in_neighbouring_cycles() -> None:
    """Two examples of one holder, last group and first group: their columns overlap across the cycle's end,
    so adding squared shifts of cycles is too little; with the noise split in two it is enough."""
    experiment = prepare(of("dp_mf", "train.steps=40"))
    planned = experiment.mechanism
    mechanism = planned.method.at.noise.factorisation(planned.participation, 40)
    assert mechanism is not None
    encoder, _ = mechanism.factors(40)
    norm = mechanism.column_norm(40)
    assert np.linalg.norm(encoder[:, 3] + encoder[:, 4]) ** 2 > 1.5 * 2 * norm**2
    generator = np.random.Generator(np.random.Philox(key=2))
    for _ in range(300):
        drawn = generator.binomial(generator.integers(1, 4, 4)[np.arange(40) % 4], 0.6)
        of_cycle = np.add.reduceat(drawn, np.arange(0, 40, 4)) * norm
        assert np.linalg.norm(encoder @ drawn) ** 2 <= 2 * np.sum(of_cycle**2)
    plan = experiment.mechanism
    found = events.releases(plan.total_event_for_holder(40, 2))[0]
    single = events.releases(plan.event_at(0))[0]
    assert found.noise_multiplier == pytest.approx(single.noise_multiplier / math.sqrt(2))
    assert found.sampling_rate == single.sampling_rate
    assert plan.total_event_for_holder(40, 1) == plan.total_event(40)
    assert events.releases(plan.total_event_for_holder(37, 2))[0].times == 10
    values = [
        accountant.holder_epsilon_of_event(event, DELTA, 2).value
        for event in (plan.total_event(40), plan.total_event_for_holder(40, 2))
    ]
    assert values[0] is not None
    assert values[1] is not None
    assert values[0] < values[1] < 2.2 * values[0]


def test_within_one_cycle_or_with_one_band_nothing_overlaps() -> None:
    one = ("sampler.options={groups: 1}", "noise.options={bands: 1}")
    for config in (of("dp_mf", "train.steps=4"), of("dp_mf", *one), of("dp_mf", "noise.options={bands: 1}")):
        assert prepare(config).mechanism.holder_noise_factor == 1.0


def test_mf_refuses_more_groups_than_the_rate_allows_and_more_bands_than_groups() -> None:
    with pytest.raises(InputError, match=r"groups 5 with sampling rate 0.25.*above 1.*to 4, .* 80 or less"):
        prepare(of("dp_mf", "sampler.options={groups: 5}"))
    with pytest.raises(InputError, match="groups must be a positive"):
        prepare(of("dp_mf", "sampler.options={groups: 0}"))
    with pytest.raises(InputError, match="bands must be a positive"):
        prepare(of("dp_mf", "noise.options={bands: 0}"))
    with pytest.raises(InputError, match=r"banded with 5 bands needs units .* they can be 4 apart"):
        prepare(of("dp_mf", "noise.options={bands: 5}"))


def test_ftrl_refuses_a_batch_that_does_not_divide_a_pass() -> None:
    with pytest.raises(InputError, match=r"280 does not divide the 400 examples.*expected_batch_size to 400"):
        prepare(of("dp_ftrl", "train.expected_batch_size=280"))
    with pytest.raises(InputError, match="expected batch above N"):
        prepare(of("dp_ftrl", "train.expected_batch_size=401"))
    near = prepare(of("dp_ftrl", "train.expected_batch_size=60")).mechanism
    assert near.budget.family.period == 7, "57 is near enough"


@pytest.mark.parametrize("name", BOTH)
def test_exactly_one_of_target_and_multiplier(name: str) -> None:
    for overrides in (["privacy.target_epsilon=1"], ["privacy.noise_multiplier=null"]):
        with pytest.raises(InputError, match="exactly one"):
            prepare(of(name, *overrides))


@pytest.mark.parametrize("name", BOTH)
def test_offline_holders_only_take_away(name: str) -> None:
    config = of(name, "federation.availability=0.5", "train.expected_batch_size=40")
    node = Node(config, 0, config.seed)
    everyone = node.method
    for task in tasks(prepare(config), 5):
        drawn = node.drawn(task)
        assert set(drawn) <= set(node.ids[everyone.selected(task, node.ids, 400)])
    assert prepare(config).mechanism.sampling_rate == pytest.approx(1 / 5)


class FailsAt:
    """A ClientApp whose node 1 fails for good in one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, message: Any, context: Any) -> Any:
        last = message.metadata.message_type == "train" and context.node_config["partition-id"] == 1
        if last and wire.unpack_task(message.content)[0].step == self.step:
            raise OSError("this holder is gone")
        return app(message, context)


@pytest.mark.parametrize("name", BOTH)
def test_broken_at_any_step_it_goes_on_exactly(name: str, tmp_path: Path) -> None:
    """Checkpoints after steps 3 and 6, passes and cycles of 4: before, at and after each of them."""
    config = of(name, "data.train_examples=100", "train.expected_batch_size=25", "train.steps=8",
                "train.checkpoint_every=3", "federation.holders=4", "train.eval_every=8")  # fmt: skip
    train(config, tmp_path / "unbroken")
    for step in range(8):
        out = tmp_path / str(step)
        with pytest.raises(RunError, match="holder is gone"):
            train(config, out, client=FailsAt(step))
        train(config, out, resume=True)
        assert torch.equal(final(out), final(tmp_path / "unbroken")), step
        assert ledger.read(out / "ledger.jsonl").steps == 8


@pytest.mark.parametrize("name", BOTH)
def test_losing_the_memory_costs_time_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(of(name), tmp_path / "unbroken")
    monkeypatch.setattr(Stream, "state_dict", lambda self: {})
    with pytest.raises(RunError):
        train(of(name), tmp_path / "broken", client=FailsAt(5))
    train(of(name), tmp_path / "broken", resume=True)
    assert torch.equal(final(tmp_path / "broken"), final(tmp_path / "unbroken"))


@pytest.mark.parametrize("name", BOTH)
def test_secure_noise_is_not_written_to_checkpoints(name: str, tmp_path: Path) -> None:
    for source in ("secure", "seeded"):
        with pytest.raises(RunError):
            train(of(name, f"privacy.noise_source={source}"), tmp_path / source, client=FailsAt(3))
        held = load_file(sorted((tmp_path / source / "checkpoints").glob("*.safetensors"))[-1])
        assert any(key.startswith("noise.") for key in held) == (source == "seeded")
    result = train(of(name, "privacy.noise_source=secure"), tmp_path / "secure", resume=True)
    assert result["steps"] == 6


@pytest.mark.parametrize("name", BOTH)
def test_reported_epsilons_are_finite_and_ordered(name: str) -> None:
    config = of(name, "federation.holders=400", "federation.partition=iid")
    experiment = prepare(config)
    told = shown(epsilons(experiment.mechanism, 6, config), public_only=False)
    example, check = told["example"].value, told["example_check"].value
    assert example is not None
    assert check is not None
    assert 0 < example <= check
    assert told["holder"].value == pytest.approx(example), "a holder of one example is one example"
