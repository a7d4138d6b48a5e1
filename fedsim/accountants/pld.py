"""Privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), by dp_accounting: tight."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.accountants import ACCOUNTANTS
from fedsim.accountants.base import Accountant
from fedsim.privacy import loss_distribution
from fedsim.privacy.loss_distribution import TOLERANCE, Part


@ACCOUNTANTS.register("pld")
@dataclass(frozen=True)
class Pld(Accountant):
    """Privacy loss distributions on a grid: tight, and the default."""

    takes_groups = True
    searches_coarsely = True
    check = "rdp"

    def epsilon(
        self, parts: tuple[Part, ...], delta: float, tolerance: float = TOLERANCE
    ) -> tuple[float | None, str]:
        """See `Accountant.epsilon`."""
        return loss_distribution.epsilon(parts, delta, tolerance)
