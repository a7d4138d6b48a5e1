"""Published accounting: every row of the table, recomputed and calibrated back.

The golden epsilons were computed once with dp_accounting 0.6.0 at its default settings (PLD on a grid of
1e-4, coarser by hand for the rows above 1000), so they also check the grid that fedsim chooses by itself.
"""

from __future__ import annotations

import dp_accounting as dp
import pytest

from fedsim.privacy import accountant, published, search
from fedsim.privacy.accountant import EpsilonResult
from fedsim.privacy.family import EventFamily
from fedsim.privacy.published import PublishedSetting

pytestmark = pytest.mark.exact

ROWS = published.rows()
KURAKIN = [row for row in ROWS if row.uses_objax]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.paper[:6]}-{row.epsilon_pld:g}")


def test_the_table_is_whole() -> None:
    assert len(ROWS) == 43
    assert {row.paper.split(" et al")[0] for row in ROWS} == {"De", "Kurakin", "Mehta", "Sander", "Yu"}
    assert len(KURAKIN) == 5
    assert min(row.noise_multiplier for row in ROWS) < 0.003


@each_row
def test_both_accountants_give_the_golden_values(row: PublishedSetting) -> None:
    event = row.event()
    assert accountant.epsilon(event, row.delta, "rdp").value == pytest.approx(row.epsilon_rdp, rel=5e-3)
    assert accountant.epsilon(event, row.delta, "pld").value == pytest.approx(row.epsilon_pld, rel=5e-3)


@each_row
@pytest.mark.parametrize("name", ["rdp", "pld"])
def test_calibration_recovers_the_noise(
    row: PublishedSetting, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other accountant says of the noise that was found is looked at above."""

    def by_itself(event: dp.DpEvent, delta: float, asked: str, unit: str) -> EpsilonResult:
        return accountant.epsilon(event, delta, name, unit)

    monkeypatch.setattr(search, "epsilon", by_itself)
    target = row.epsilon_rdp if name == "rdp" else row.epsilon_pld
    found = search.noise_multiplier_for(
        target, row.delta, EventFamily.gaussian(row.sampling_rate), row.steps, name
    )
    assert found.noise_multiplier == pytest.approx(row.noise_multiplier, rel=5e-3)
    assert found.achieved.value is not None
    assert target * (1 - 3e-4) <= found.achieved.value <= target


@pytest.mark.parametrize(
    ("row", "expected"),
    list(zip(KURAKIN, (9.770e8, 6.073e7, 3.545e6, 6.688e4, 10.82), strict=True)),
    ids=lambda value: value.setting[-9:] if isinstance(value, PublishedSetting) else "",
)
def test_the_objax_accountant_reproduces_kurakin(row: PublishedSetting, expected: float) -> None:
    value = accountant.epsilon(row.event(), row.delta, "rdp_objax").value
    assert value == pytest.approx(expected, rel=6e-4)


def test_max_steps_of_known_configurations() -> None:
    assert search.max_steps(1.0, 1e-5, EventFamily.gaussian(4096 / 50_000), 10.0, "rdp") == 895
    imagenet = search.max_steps(8.0, 8e-7, EventFamily.gaussian(16_384 / 1_271_167), 2.5, "rdp")
    assert imagenet == pytest.approx(71_592, rel=2e-4)


def test_a_holder_of_ten_and_of_a_hundred_at_example_epsilon_three() -> None:
    calibrated = search.noise_multiplier_for(3.0, 1e-5, EventFamily.gaussian(0.02), 1000)
    ten = accountant.holder_epsilon(calibrated.noise_multiplier, 0.02, 1000, 1e-5, 10)
    hundred = accountant.holder_epsilon(calibrated.noise_multiplier, 0.02, 1000, 1e-5, 100)
    assert ten.value == pytest.approx(53.0, rel=0.02)
    assert hundred.value == pytest.approx(2209.0, rel=0.03)


def test_the_comparison_flags_what_does_not_agree() -> None:
    rows = {row.setting: row for row in ROWS}
    agree = rows["CIFAR-100 fine-tune WRN-28-10 (IN32 pretrain) K=16"]
    off = next(row for row in ROWS if "Sander et al. 2022" in row.paper and row.batch == 4096)
    silent = next(row for row in ROWS if row.epsilon_published is None)
    first, second, third = published.compare([agree, off, silent])
    assert not first.differs
    assert second.differs
    assert "7.098" in second.note
    assert not third.differs
    assert [found.rdp_objax is None for found in published.compare([agree, KURAKIN[0]])] == [True, False]
    assert not published.compare([KURAKIN[0]])[0].differs
