"""Fixed-size sampling: what is drawn, and what it costs under each library's convention."""

from __future__ import annotations

from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import pld, rdp
from scipy import integrate, stats

from fedsim import seeds
from fedsim.engine.experiment import prepare
from fedsim.privacy import accountant, events, ledger
from fedsim.samplers import Draw
from fedsim.samplers.fixed_size import FixedSize
from fedsim.validate import InputError
from tests.conftest import small, train

DELTA = 1e-5
FIXED = "sampler=fixed_size"


def taken(step: int, population: int = 50, sample: int = 10) -> np.ndarray:
    draw = Draw(step, sample / population, population, {"draw": seeds.derive(5, "draw", step)})
    return FixedSize().selected(draw, np.arange(population))


def test_every_subset_is_as_likely_as_any_other() -> None:
    """Each unit, and each pair, at its rate over 20,000 steps; false alarm 1e-6 each, Bonferroni."""
    rows = np.stack([taken(step, 12, 4) for step in range(20_000)])
    assert (rows.sum(axis=1) == 4).all()
    singles = rows.sum(axis=0)
    pairs = (rows.T.astype(int) @ rows)[np.triu_indices(12, 1)]
    for counts, rate in ((singles, 4 / 12), (pairs, 4 * 3 / (12 * 11))):
        limit = stats.norm.isf(1e-6 / (2 * len(counts))) * np.sqrt(len(rows) * rate * (1 - rate))
        assert np.abs(counts - len(rows) * rate).max() < limit
    poisson = rows.sum(axis=0) * 0 + 4 * 4 / (12 * 12) * len(rows)
    assert np.abs(pairs - poisson[0]).min() > 0, "pairs of a fixed-size draw are rarer than independent ones"


def test_the_whole_population_is_everybody_and_draws_differ_over_steps() -> None:
    assert taken(0, 10, 10).all()
    assert not np.array_equal(taken(0), taken(1))


REPLACE = dp.NeighboringRelation.REPLACE_ONE


@pytest.mark.exact
@pytest.mark.parametrize(("population", "sample", "sigma"), [(1000, 50, 2.0), (400, 100, 3.0)])
def test_epsilon_is_that_of_the_library_for_sampling_without_replacement(
    population: int, sample: int, sigma: float
) -> None:
    """By Renyi DP, whose bound composes (Wang, Balle, Kasiviswanathan 2019), whoever is asked. The library
    takes the multiplier as noise / 2 C; here it is over the bound C on one contribution."""
    event = events.composed(events.fixed_size_step(sigma, population, sample), 100)
    one = dp.SampledWithoutReplacementDpEvent(population, sample, dp.GaussianDpEvent(sigma / 2.0))
    wanted = rdp.RdpAccountant(neighboring_relation=REPLACE).compose(one, 100).get_epsilon(DELTA)
    for asked in ("pld", "rdp"):
        ours = accountant.epsilon(event, DELTA, asked)
        assert ours.value == pytest.approx(wanted, rel=1e-9)
        assert (ours.accountant, ours.relation) == ("rdp", "replace one")
        assert ours.amplification == f"sampling without replacement with rate {sample / population:g}"
    poisson = events.composed(events.gaussian_step(sigma / 2.0, sample / population), 100)
    tight = accountant.epsilon(poisson, DELTA).value
    assert tight is not None
    assert wanted > tight, "no less than what dominates it in one direction"


@pytest.mark.exact
def test_the_conventions_of_the_library_for_replace_one() -> None:
    """Its Renyi side takes the multiplier as noise / 2 C, its loss distributions as noise / C. Everybody in
    every step is one Gaussian, for which loss distributions answer."""
    full = accountant.epsilon(events.fixed_size_step(2.0, 40, 40), DELTA)
    by_rdp = (
        rdp.RdpAccountant(neighboring_relation=REPLACE).compose(dp.GaussianDpEvent(1.0)).get_epsilon(DELTA)
    )
    by_pld = (
        pld.PLDAccountant(neighboring_relation=REPLACE).compose(dp.GaussianDpEvent(2.0)).get_epsilon(DELTA)
    )
    assert full.accountant == "pld"
    assert full.value == pytest.approx(by_pld, rel=1e-3)
    assert full.value is not None
    assert full.value <= by_rdp
    assert accountant.epsilon(events.fixed_size_step(2.0, 40, 40), DELTA, "rdp").value == pytest.approx(
        by_rdp
    )


def exact_delta(epsilon: float, sigma: float, rest: tuple[float, ...], sample: int) -> float:
    """delta(epsilon) of one step, written out: the sum of `sample` of the numbers 1 and `rest`, where 1 is
    replaced by -1, with noise; mixtures over all subsets."""
    import itertools

    def density(x: np.ndarray, own: float) -> np.ndarray:
        sums = [sum(subset) for subset in itertools.combinations((own, *rest), sample)]
        return np.mean([stats.norm.pdf(x, s, sigma) for s in sums], axis=0)

    x = np.linspace(-sample - 12 * sigma, sample + 12 * sigma, 200_001)
    ratio = np.exp(epsilon)
    above = np.maximum(density(x, 1.0) - ratio * density(x, -1.0), 0.0)
    below = np.maximum(density(x, -1.0) - ratio * density(x, 1.0), 0.0)
    return max(float(integrate.trapezoid(above, x)), float(integrate.trapezoid(below, x)))


@pytest.mark.exact
@pytest.mark.parametrize("rest", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.5), (-1.0, -1.0, -1.0)])
@pytest.mark.parametrize("sample", [1, 2, 4])
def test_no_data_loses_more_than_is_stated(rest: tuple[float, ...], sample: int) -> None:
    sigma = 1.3
    for delta in (1e-2, 1e-4):
        stated = accountant.epsilon(events.fixed_size_step(sigma, 4, sample), delta).value
        assert stated is not None
        assert exact_delta(stated, sigma, rest, sample) <= delta * (1 + 1e-6)
    if rest == (0.0, 0.0, 0.0) and sample == 4:
        wrong = accountant.epsilon(events.gaussian_step(sigma, 1.0), 1e-4).value
        assert wrong is not None
        assert exact_delta(wrong, sigma, rest, sample) > 1e-4, "as if adding one were all: noticed"


def test_a_run_says_its_relation_and_claims_nothing_for_holders(tmp_path: Path) -> None:
    result = train(small(FIXED), tmp_path)
    book = ledger.read(tmp_path / "ledger.jsonl")
    assert book.header.relation == "replace one"
    assert [r.event for r in book.records] == [events.fixed_size_step(1.0, 400, 60)] * 6
    assert result["epsilon"]["example"]["relation"] == "replace one"
    assert result["epsilon"]["holder"]["value"] is None
    assert "fixed-size draw" in result["epsilon"]["holder"]["note"]
    poisson = accountant.epsilon(events.composed(events.gaussian_step(1.0, 0.15), 6), DELTA).value
    assert poisson is not None
    assert result["epsilon"]["example"]["value"] > poisson


def test_an_example_of_a_holder_that_is_drawn_by_fixed_size_is_the_holder_replaced() -> None:
    config = small(FIXED, "query=holder_update", "train.expected_batch_size=80")
    mechanism = prepare(config).mechanism
    assert mechanism.example_noise_factor == 1.0
    assert mechanism.event_at(0) == events.fixed_size_step(1.0, 10, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.expected_batch_size=60.5"], "whole number of the 400 units .*expected_batch_size to 60"),
        (["federation.availability=0.5"], "some of them are offline"),
        (["query=holder_update"], "whole number of the 10 units .* stands for 1.5"),
        (["strategy=shares"], "is proved for Poisson draws"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(FIXED, *overrides))


def test_events_go_through_files() -> None:
    event = events.composed(events.fixed_size_step(1.5, 30, 7), 4)
    assert events.from_json(events.to_json(event)) == event
    assert events.releases(events.with_noise(event, 2.0)) == ((1.5, 7 / 30, 4, (30, 7)),)
    with pytest.raises(InputError, match="one neighbouring relation"):
        events.relation(events.sequence([events.fixed_size_step(1.0, 3, 1), events.gaussian_step(1.0, 0.5)]))
