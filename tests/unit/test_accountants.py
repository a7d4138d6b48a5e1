"""Accountants as an axis: which there are, what they answer for, and whose answer is a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsim.accountants import ACCOUNTANTS, Accountant
from fedsim.engine.experiment import prepare
from fedsim.privacy import accountant, events, search
from fedsim.privacy.family import EventFamily
from fedsim.privacy.loss_distribution import Part
from fedsim.validate import InputError
from tests.conftest import command, small, train

pytestmark = pytest.mark.exact
DELTA = 1e-5
EVENT = events.composed(events.gaussian_step(1.0, 0.01), 1000)


@dataclass(frozen=True)
class Basic(Accountant):
    """Basic composition of Gaussian releases (Dwork, Roth 2014, Appendix A): a bad bound."""

    def epsilon(
        self, parts: tuple[Part, ...], delta: float, tolerance: float = 0.0
    ) -> tuple[float | None, str]:
        steps = sum(part.times for part in parts)
        factor = math.sqrt(2 * math.log(1.25 * steps / delta))
        return math.fsum(part.times * factor * part.examples / part.noise_multiplier for part in parts), ""


OWN = f"{__name__}:Basic"


def test_every_bound_is_at_least_the_tight_one() -> None:
    tight = accountant.epsilon(EVENT, DELTA).value
    assert tight is not None
    for name, made in ACCOUNTANTS.own().items():
        found = accountant.epsilon(EVENT, DELTA, name)
        assert found.value is not None
        assert found.accountant == name
        assert (found.value >= tight * 0.999) or not made.is_upper_bound, name


def test_the_central_limit_is_near_too_small_and_says_so() -> None:
    """Bu, Dong, Long, Su 2020: near for many small releases; below what is proved, so nobody may claim it."""
    many = events.composed(events.gaussian_step(1.1, 256 / 60_000), 3 * 60_000 // 256)
    tight, limit = (accountant.epsilon(many, DELTA, name) for name in ("pld", "gdp"))
    assert limit.value is not None
    assert tight.value is not None
    assert 0.5 * tight.value < limit.value < tight.value
    assert "an approximation, not a bound" in limit.describe()
    full = events.composed(events.gaussian_step(2.0, 1.0), 10)
    exact = accountant.epsilon(full, DELTA).value
    assert accountant.epsilon(full, DELTA, "gdp").value == pytest.approx(exact), (
        "one Gaussian: no limit needed"
    )


def test_what_is_no_bound_calibrates_and_stops_nothing() -> None:
    family = EventFamily.gaussian(0.01)
    with pytest.raises(InputError, match="approximation, not an upper bound"):
        search.noise_multiplier_for(1.0, DELTA, family, 10, "gdp")
    with pytest.raises(InputError, match="approximation, not an upper bound"):
        search.max_steps(1.0, DELTA, family, 1.0, "gdp")
    with pytest.raises(InputError, match="approximation, not an upper bound"):
        prepare(small("privacy.accountant=gdp"))


def test_an_own_accountant_by_reference_accounts_a_run(tmp_path: Path) -> None:
    config = small(f"privacy.accountant={OWN}", "privacy.noise_multiplier=null", "privacy.target_epsilon=200")
    result = train(config, tmp_path)
    found = result["epsilon"]["example"]
    assert found["accountant"] == OWN
    assert 199.9 < found["value"] <= 200
    assert result["epsilon"]["example_check"]["accountant"] == "pld"
    sigma = result["noise_multiplier"]
    assert 6 * math.sqrt(2 * math.log(1.25 * 6 / DELTA)) / sigma == pytest.approx(found["value"])


def test_an_event_it_does_not_support_is_answered_by_whole_orders() -> None:
    event = events.composed(events.renyi_gaussian_step(1.0, 0.1), 10)
    assert ACCOUNTANTS.own()["pld"]().supports(event)
    for name in ("pld", "rdp", OWN):
        assert accountant.epsilon(event, DELTA, name).accountant == "rdp_integer"


def test_an_unknown_one_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"privacy.accountant must be .*pld, rdp"):
        prepare(small("privacy.accountant=prv"))
    with pytest.raises(InputError, match=r"must name a fedsim\.accountants\.Accountant"):
        prepare(small("privacy.accountant=math:pi"))


def test_the_command_takes_any(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--noise-multiplier", "1", "--sampling-rate", "0.01", "--steps", "100", "--delta", "1e-5"]
    assert command(["epsilon", *settings, "--accountant", "gdp"]) == 0
    assert "an approximation, not a bound" in " ".join(capsys.readouterr().out.split())
    assert command(["epsilon", *settings, "--accountant", "rpd"]) == 2
    assert "rdp" in capsys.readouterr().err
