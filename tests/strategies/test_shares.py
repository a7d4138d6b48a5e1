"""shares_dpsgd and local_dpsgd end to end: what they compute, refuse and record."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.privacy import events, ledger
from fedsim.types import StepTask
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train

TINY = ("privacy.noise_multiplier=1e-9", "train.eval_every=1000", "model.dtype=float64")
SHARES = "strategy.name=shares_dpsgd"


def options(**values: object) -> str:
    return "strategy.options={" + ", ".join(f"{k}: {v}" for k, v in values.items()) + "}"


def test_without_noise_to_speak_of_it_is_central_with_clipping(tmp_path: Path) -> None:
    for holders, nodes in ((10, 2), (3, 3)):
        own = (f"federation.holders={holders}", f"federation.nodes={nodes}")
        train(small(*TINY, *own, SHARES), tmp_path / f"shares{holders}")
        train(small(*TINY, *own), tmp_path / f"central{holders}")
        gap = final(tmp_path / f"shares{holders}") - final(tmp_path / f"central{holders}")
        assert torch.max(torch.abs(gap)) < 1e-7


@pytest.mark.parametrize("changes", [{"rotate": "false"}, {"noise": "discrete_gaussian"}, {"ring_bits": 64}])
def test_every_option_computes_the_same_sum(changes: dict[str, object], tmp_path: Path) -> None:
    train(small(*TINY, "train.steps=2", SHARES, options(**changes)), tmp_path / "a")
    train(small(*TINY, "train.steps=2"), tmp_path / "b")
    assert torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b"))) < 1e-7


def test_sums_of_all_holders_at_once_equal_those_of_each_alone() -> None:
    config = small("model.dtype=float64", "federation.nodes=2", "engine.physical_batch_size=16", SHARES)
    node = Node(config, 1, config.seed)
    root_keys = node.strategy.keys(config.seed, 0)
    task = StepTask(0, 0, 0.3, root_keys)
    clip = node.strategy.clip_rule()
    ids = node.drawn(task)
    sums, together = node.clipped_sums(ids, task, clip)
    assert together.count == len(ids) == len(together.norms)
    for row, holder in enumerate(node.holders):
        own = node.clipped_sum(ids[node.owners(ids) == holder], task, clip)
        assert torch.allclose(sums[row], own.sum, atol=1e-12)
    whole = node.clipped_sum(ids, task, clip)
    assert torch.allclose(sums.sum(0), whole.sum, atol=1e-12)
    assert torch.allclose(together.norms, whole.norms, rtol=1e-12)  # two engines: equal to rounding
    nothing, empty = node.clipped_sums(ids[:0], task, clip)
    assert not nothing.any()
    assert empty.count == 0


def test_dropped_holders_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    """With the noise vanishing, the update is the sum over those who stayed; statistics count only them."""
    config = small(*TINY, "train.steps=3", SHARES, options(min_survivors=3, dropout_rate=0.3))
    train(config, tmp_path / "a")
    survivors = [r.facts["survivors"] for r in ledger.read(tmp_path / "a" / "ledger.jsonl").records]
    assert min(survivors) < 10
    train(small(*TINY, "train.steps=3"), tmp_path / "b")
    assert torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b"))) > 1e-4
    train(config, tmp_path / "c")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "c"))


def test_the_result_does_not_depend_on_nodes_or_physical_batch(tmp_path: Path) -> None:
    drop = options(min_survivors=5, dropout_rate=0.2)
    base = ("train.steps=2", "model.dtype=float64", SHARES, drop)
    train(small(*base), tmp_path / "a")
    train(small(*base, "federation.nodes=5", "engine.physical_batch_size=7"), tmp_path / "b")
    gap = torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b")))
    assert gap < 1e-5, "sums that lie on a rounding boundary may differ by one ring unit"


def test_a_shortfall_stops_before_anything_is_released(tmp_path: Path) -> None:
    config = small(SHARES, options(dropout_rate=0.5))
    with pytest.raises(RunError, match=r"holders are left, 10 are needed.*top_up"):
        train(config, tmp_path)
    assert ledger.read(tmp_path / "ledger.jsonl").steps == 0


def test_holders_that_are_offline_count_as_dropped(tmp_path: Path) -> None:
    config = small(SHARES, "federation.availability=0.8", options(min_survivors=3))
    train(config, tmp_path)
    survivors = [r.facts["survivors"] for r in ledger.read(tmp_path / "ledger.jsonl").records]
    assert 3 <= min(survivors) < 10


def test_too_few_shares_to_unmask_are_refused(tmp_path: Path) -> None:
    config = small(
        SHARES, options(on_shortfall="top_up", dropout_rate=0.9, tolerated_dropouts=0.1, corrupt=0.3)
    )
    with pytest.raises(RunError, match="secure sum refused"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((options(min_survivors=11),), "min_survivors must be between 1 and the 10 holders"),
        (("federation.holders=3", options(neighbours=2, threshold=3)), "share threshold must be between"),
        (("federation.holders=1", "federation.nodes=1"), "must be between 2 and"),
        ((options(threshold=3),), "given together"),
        ((options(corrupt=0.6, tolerated_dropouts=0.6),), "cannot stand"),
        ((options(on_shortfall="ignore"),), "on_shortfall must be one of"),
        ((options(noise="gaussian"),), "noise must be one of"),
        ((options(ring_bits=16),), "ring_bits must be one of"),
        ((options(ring_bits=32), "privacy.noise_multiplier=1e-8"), "ring too small for the sum"),
        (("privacy.target_epsilon=3",), "both given"),
        (("privacy.noise_multiplier=null",), "neither given"),
    ],
)
def test_wrong_combinations_are_refused_with_the_reason(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(SHARES, *changes))


def test_target_epsilon_is_met_by_the_recorded_event_with_more_real_noise() -> None:
    config = small(SHARES, "privacy.noise_multiplier=null", "privacy.target_epsilon=3")
    plan = prepare(config).plan
    assert plan.noise is not None
    assert plan.budget.calibration is not None
    assert plan.budget.calibration.achieved.value == pytest.approx(3.0, rel=1e-3)
    (release,) = events.releases(plan.event_at(0))
    assert release.noise_multiplier == plan.budget.calibration.noise_multiplier
    assert 1.0 <= plan.noise.noise_multiplier / release.noise_multiplier < 1.006
    central = prepare(small("privacy.noise_multiplier=null", "privacy.target_epsilon=3")).plan.noise
    assert central is not None
    assert 1.0 < plan.noise.noise_multiplier / central.noise_multiplier < 1.15, "Renyi instead of PLD"


def test_budget_stops_the_run() -> None:
    plan = prepare(small(SHARES, "privacy.stop_at_epsilon=3", "train.steps=500")).plan
    assert plan.stopped_by_budget
    assert 0 < plan.steps < 500


def test_local_noise_reaches_the_sum_once_a_holder(tmp_path: Path) -> None:
    config = small("strategy.name=local_dpsgd", "federation.availability=0.5", "train.steps=2")
    prepared = prepare(config)
    assert prepared.plan.noise is not None
    assert prepared.strategy.noise_std_of_sum(prepared.plan) == pytest.approx(0.5 * math.sqrt(10))
    assert prepared.plan.event_at(0) == prepare(small("federation.availability=0.5")).plan.event_at(0)
    train(config, tmp_path / "a")
    train(
        small(
            *("strategy.name=local_dpsgd", "federation.availability=0.5", "train.steps=2"),
            "federation.nodes=5",
        ),
        tmp_path / "b",
    )
    assert np.allclose(final(tmp_path / "a"), final(tmp_path / "b"), atol=1e-5), "noise belongs to holders"
