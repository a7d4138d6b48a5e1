"""Variants from outside that say one thing and do another are noticed before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.engine.experiment import prepare
from fedsim.noise.independent import Independent
from fedsim.noise.tree import Tree
from fedsim.queries.base import Query
from fedsim.queries.gradient import Gradient
from fedsim.samplers import Draw, Participation
from fedsim.samplers.fixed_size import FixedSize
from fedsim.samplers.keyed import PoissonSampler
from fedsim.samplers.poisson import Poisson
from fedsim.validate import InputError
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


def test_multipliers_that_are_not_one_a_part_are_refused() -> None:
    with pytest.raises(InputError, match=r"TwoMultipliers splits .* for \['sum'\]"):
        prepare(small(f"query={HERE}:TwoMultipliers"))
