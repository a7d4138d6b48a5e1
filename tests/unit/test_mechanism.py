"""A mechanism refuses parts that do not add up to its event, and scales the noise of each by its bound."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedsim.config import Config
from fedsim.engine.experiment import prepare
from fedsim.mechanism import Mechanism
from fedsim.method import Method
from fedsim.noise.stream import Stream
from fedsim.privacy import events
from fedsim.queries.base import Shape
from fedsim.queries.gradient import Gradient
from fedsim.queries.statistic import Part, Statistic, within
from fedsim.strategies.base import Collected, DataFacts
from fedsim.validate import InputError
from fedsim.visibility import Public
from tests.conftest import small

FACTS = DataFacts(400, 10, Public(40), 7)
HERE = __name__


@dataclass(frozen=True)
class Twice(Gradient):
    """A sum and a mean square; `spent` is the share of 1 / sigma^2 that both together take."""

    spent: float = 1.0

    def statistic(self, shape: Shape, clip: Any, state: Any) -> Statistic:
        more = Part("square", 1, np.dtype(np.float64), 3.0, purpose="square")
        return Statistic((*super().statistic(shape, clip, state).parts, more))

    def multipliers(self, noise_multiplier: float, expected_units: float) -> tuple[float, ...]:
        both = noise_multiplier * math.sqrt(2 / self.spent)
        return both, both


def of(config: Config) -> Mechanism:
    return Mechanism.of(Method.of(config), FACTS)


def test_parts_within_a_multiplier() -> None:
    assert within((1.0,), 1.0)
    assert within((math.sqrt(2), math.sqrt(2)), 1.0)
    assert not within((math.sqrt(2), 1.41), 1.0)
    assert not within((1.0, 100.0), 1.0)


@pytest.mark.parametrize("attribute", ["name", "purpose"])
def test_parts_share_neither_name_nor_key(attribute: str) -> None:
    one = Part("a", 1, np.dtype(np.float64), 1.0, purpose="x")
    other = Part("b", 1, np.dtype(np.float64), 1.0, purpose="y")
    Statistic((one, other))
    with pytest.raises(InputError, match=f"each have a {attribute}"):
        Statistic((one, dataclasses.replace(other, **{attribute: getattr(one, attribute)})))


def test_a_query_that_spends_more_than_the_whole_is_refused() -> None:
    query = f"query={{name: '{HERE}:Twice', options: {{spent: SPENT}}}}"
    mechanism = of(small(query.replace("SPENT", "1.0")))
    release = mechanism.release()
    assert release.noise_stds == pytest.approx({"sum": 0.5 * math.sqrt(2), "square": 3 * math.sqrt(2)})
    assert mechanism.event_at(0) == events.gaussian_step(1.0, mechanism.sampling_rate)
    with pytest.raises(InputError, match="splits noise multiplier 1 into parts that together have less"):
        of(small(query.replace("SPENT", "1.01")))
    halved = "noise={name: schedule, options: {factors: [1.0, 0.5]}}"
    assert of(small(query.replace("SPENT", "1.0"), halved)).noise_factor(5) == 0.5


def test_noise_of_parts_is_independent_and_of_their_own_keys() -> None:
    mechanism = prepare(small(f"query={HERE}:Twice")).mechanism
    release = mechanism.release()
    rows = [mechanism.noise(release, Collected({}, []), Stream(), 0, step) for step in range(400)]
    square = np.array([row["square"][0] for row in rows])
    first = np.array([row["sum"][0] for row in rows])
    # False alarms: bounds of five standard errors, below 2e-6 together.
    assert square.std() == pytest.approx(3 * math.sqrt(2), rel=5 / math.sqrt(800))
    assert abs(np.corrcoef(square, first)[0, 1]) < 5 / math.sqrt(400)


@pytest.mark.parametrize(
    "over_time", [[], ["sampler=passes", "noise=tree"], ["sampler=cyclic", "noise=banded"]], ids=str
)
def test_only_the_main_part_pays_for_correlation_over_time(over_time: list[str]) -> None:
    """By the sensitivity of the whole release; a unit moves the fresh noise of the others in one step."""
    mechanism = of(small(f"query={HERE}:Twice", "train.expected_batch_size=80", *over_time))
    stds = mechanism.release().noise_stds
    assert stds["square"] == pytest.approx(3 * math.sqrt(2))
    assert stds["sum"] == pytest.approx(0.5 * math.sqrt(2) * mechanism.column_norm)
    assert (mechanism.column_norm > 1) == bool(over_time)
