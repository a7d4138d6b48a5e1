"""Epsilon of the best of a hidden number of runs: against the paper's formula, and against the truth."""

from __future__ import annotations

import math
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
from scipy import stats

from fedsim import loading
from fedsim.engine.experiment import prepare
from fedsim.privacy import accountant, events, ledger, search
from fedsim.privacy.events import DISTRIBUTIONS, Selection
from fedsim.privacy.family import EventFamily
from fedsim.privacy.ledger_view import LedgerHeader
from fedsim.study.private_tune import number_of_trials
from fedsim.validate import InputError
from tests.conftest import SMALL

DELTA = 1e-5
ORDERS = np.array(dp.rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS)


def by_the_paper(curve: np.ndarray, selection: Selection) -> float:
    """Papernot and Steinke 2022, theorem 2 (truncated negative binomial) and theorem 6 (Poisson)."""
    mean = selection.mean
    if selection.distribution == "poisson":
        hats = np.log1p(1.0 / (ORDERS - 1.0))
        delta_of = dp.rdp.rdp_privacy_accountant.compute_delta
        deltas = np.array([delta_of(list(ORDERS), list(curve), hat)[0] for hat in hats])
        total = curve + mean * deltas + math.log(mean) / (ORDERS - 1.0)
    else:
        shape = DISTRIBUTIONS[selection.distribution]
        low, high = 1e-12, 1.0 - 1e-12
        for _ in range(200):
            gamma = (low + high) / 2.0
            ratio = (1.0 / gamma - 1.0) / math.log(1.0 / gamma)
            if shape:
                ratio = shape * (1.0 - gamma) / (gamma * (1.0 - gamma**shape))
            low, high = (gamma, high) if ratio > mean else (low, gamma)
        constant = (1.0 + shape) * np.min((1.0 - 1.0 / ORDERS) * curve + math.log(1.0 / low) / ORDERS)
        total = curve + constant + math.log(mean) / (ORDERS - 1.0)
        total = np.minimum.accumulate(total[::-1])[::-1]  # Renyi DP rises with the order
    return float(dp.rdp.compute_epsilon(list(ORDERS), list(total), DELTA)[0])


@pytest.mark.exact
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mean", [1.5, 10.0, 50.0])
@pytest.mark.parametrize(("sigma", "rate", "steps"), [(2.0, 0.1, 100), (4.0, 1.0, 3)])
def test_epsilon_is_the_papers_formula(
    distribution: str, mean: float, sigma: float, rate: float, steps: int
) -> None:
    run = events.composed(events.gaussian_step(sigma, rate), steps)
    curve = np.array(dp.rdp.RdpAccountant(ORDERS).compose(run).rdp)
    selection = Selection(mean, distribution)
    found = accountant.epsilon(events.selected(run, selection), DELTA)
    assert found.accountant == "rdp"
    assert found.value == pytest.approx(by_the_paper(curve, selection), rel=1e-6)


@pytest.mark.exact
@pytest.mark.parametrize(
    ("distribution", "cost"), [("geometric", 5.0), ("logarithmic", 4.3), ("poisson", 5.5)]
)
def test_a_search_of_ten_on_average_costs_what_the_page_says(distribution: str, cost: float) -> None:
    family = EventFamily.gaussian(0.1)
    sigma = search.noise_multiplier_for(2.6, DELTA, family, 100, "rdp").noise_multiplier
    event = events.selected(family.event(sigma, 100), Selection(10.0, distribution))
    assert accountant.epsilon(event, DELTA).value == pytest.approx(cost, abs=0.05)


def truth(sigma: float, selection: Selection, epsilon: float) -> float:
    """The true delta at epsilon where the score is what is released: the largest of K values of a Gaussian
    mechanism has distribution G(F(y)), with the generating function G of K and F of one value."""
    x = np.linspace(-12.0 * sigma, 12.0 * sigma + 1.0, 400_001)
    mean, worst = selection.mean, 0.0

    def generating(s: np.ndarray) -> np.ndarray:
        """The derivative of G."""
        match selection.distribution:
            case "geometric":
                return (1.0 / mean) / (1.0 - (1.0 - 1.0 / mean) * s) ** 2
            case "poisson":
                return mean * np.exp(mean * (s - 1.0))
        p = _log_series(mean)
        return p / ((1.0 - p * s) * -math.log1p(-p))

    for one, other in ((0.0, 1.0), (1.0, 0.0)):
        f = stats.norm.pdf(x, one, sigma) * generating(stats.norm.cdf(x, one, sigma))
        g = stats.norm.pdf(x, other, sigma) * generating(stats.norm.cdf(x, other, sigma))
        worst = max(worst, float(np.trapezoid(np.maximum(f - math.exp(epsilon) * g, 0.0), x)))
    return worst


def _log_series(mean: float) -> float:
    low, high = 1e-9, 1.0 - 1e-9
    for _ in range(200):
        p = (low + high) / 2.0
        low, high = (p, high) if -p / ((1.0 - p) * math.log1p(-p)) < mean else (low, p)
    return low


@pytest.mark.exact
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_epsilon_holds_where_the_truth_is_known_and_that_of_one_run_does_not(
    distribution: str, sigma: float
) -> None:
    delta, selection = 1e-3, Selection(10.0, distribution)
    run = events.gaussian_step(sigma, 1.0)
    stated = accountant.epsilon(events.selected(run, selection), delta).value
    alone = accountant.epsilon(run, delta, "pld").value
    assert stated is not None
    assert alone is not None
    assert truth(sigma, selection, stated) <= delta
    assert truth(sigma, selection, alone) > delta


def test_a_run_knows_that_it_was_selected(tmp_path: Path) -> None:
    """Target, ledger and every epsilon are those of the whole search; without it the noise is less."""
    chosen = ["privacy.noise_multiplier=null", "privacy.target_epsilon=3"]
    given = [item for item in SMALL if not item.startswith(("privacy.noise_m", "privacy.target"))]
    alone = prepare(loading.load("base", [*given, *chosen])).mechanism
    among = [*chosen, "tuning.mode=private", "tuning.trials=10"]
    mechanism = prepare(loading.load("base", [*given, *among])).mechanism
    assert mechanism.noise_multiplier > 1.2 * alone.noise_multiplier
    total = mechanism.total_event(mechanism.steps)
    run, selection = events.apart(total)
    assert selection == Selection(10.0, "geometric")
    assert accountant.epsilon(total, DELTA).value == pytest.approx(3.0, rel=1e-3)
    header = LedgerHeader("c", DELTA, selection=(10.0, "geometric"))
    with ledger.Ledger.create(tmp_path / "l", header) as book:
        for step in range(mechanism.steps):
            book.append(step, mechanism.event_at(step))
    held = ledger.read(tmp_path / "l")
    assert held.total_event() == total
    assert held.epsilon().value == pytest.approx(3.0, rel=1e-3)
    assert held.holder_epsilon(5).value is None
    assert "examples only" in held.holder_epsilon(5).note
    assert accountant.epsilon(run, DELTA).value < 2.5  # type: ignore[operator]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_number_of_trials_has_its_distribution(distribution: str) -> None:
    generator = np.random.default_rng(0)
    drawn = np.array([number_of_trials(4.0, distribution, generator) for _ in range(20_000)])
    assert abs(drawn.mean() - 4.0) < 5 * drawn.std() / math.sqrt(len(drawn))
    known = {
        "geometric": stats.geom(0.25),
        "poisson": stats.poisson(4.0),
        "logarithmic": stats.logser(_log_series(4.0)),
    }
    observed = np.bincount(np.minimum(drawn, 8), minlength=9)
    expected = {name: np.r_[law.pmf(range(8)), law.sf(7)] * len(drawn) for name, law in known.items()}
    for name, counts in expected.items():
        there = counts > 0
        fits = not observed[~there].any()
        fits = fits and stats.chisquare(observed[there], counts[there]).pvalue > 1e-4
        assert fits == (name == distribution)


@pytest.mark.parametrize("selection", [Selection(1.0), Selection(math.inf), Selection(5.0, "uniform")])
def test_selections_that_are_none_are_refused(selection: Selection) -> None:
    with pytest.raises(InputError, match="number of runs"):
        events.selected(events.gaussian_step(1.0, 1.0), selection)


def test_accountants_without_an_answer_say_why() -> None:
    event = events.selected(events.gaussian_step(2.0, 0.5), Selection(5.0))
    for name in ("pld", "gdp", "rdp_objax"):
        assert "hidden number of runs" in accountant.unsupported(event, name)
    assert not accountant.unsupported(event, "rdp")
    with pytest.raises(InputError, match="RepeatAndSelectDpEvent"):
        events.releases(events.composed(event, 2))


@pytest.mark.parametrize("preset", ["shares_dpsgd", "local_dpsgd", "dp_ftrl", "dp_mf", "dp_fedavg", "dp_ls"])
def test_every_mechanism_counts_the_selection_once(preset: str) -> None:
    """Its target is that of the whole search, by its own events, whoever calibrates them."""
    given = [
        item
        for item in SMALL
        if not item.startswith(("privacy.noise_m", "privacy.target", "optimizer", "model"))
    ]
    given += ["model.name=linear", f"preset={preset}", "privacy.target_epsilon=3"]
    if preset == "dp_ls":
        given += ["train.steps=1", "train.eval_every=1", "train.checkpoint_every=1"]
    alone = prepare(loading.load("base", given)).mechanism
    among = prepare(loading.load("base", [*given, "tuning.mode=private", "tuning.trials=10"])).mechanism
    total = among.total_event(among.steps)
    assert events.apart(total)[1] == Selection(10.0)
    stated = accountant.epsilon(total, among.method.at.config.privacy.delta)
    assert stated.accountant in ("rdp", "rdp_integer")
    assert 2.9 < stated.value <= 3.0  # type: ignore[operator]
    assert among.noise_multiplier > 1.2 * alone.noise_multiplier


def test_an_accountant_from_outside_that_says_yes_to_all_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pld = type(accountant.named("pld"))
    monkeypatch.setattr(pld, "supports", lambda self, event: "")
    run = events.gaussian_step(2.0, 0.1)
    stated = accountant.epsilon(events.selected(run, Selection(10.0)), DELTA, "pld")
    assert stated.accountant == "rdp"
    assert stated.value > accountant.epsilon(run, DELTA, "pld").value  # type: ignore[operator]
