"""Renyi DP (Mironov 2017), composed by dp_accounting at a list of orders.

`rdp` converts by Canonne, Kamath, Steinke 2020, Proposition 12. `rdp_objax` is the older way of Objax, kept
to reproduce Kurakin et al. 2022: 26 orders from 1.25 to 20, and rdp + ln(1/delta) / (order - 1) of Mironov
2017. `rdp_integer` is `rdp` at whole orders; it answers for events proved only there, whatever was asked for.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import dp_accounting as dp
import numpy as np
from numpy.typing import NDArray

from fedsim.accountants import ACCOUNTANTS
from fedsim.accountants.base import Accountant
from fedsim.privacy import events
from fedsim.privacy.loss_distribution import TOLERANCE, Part

MAX_INTEGER_ORDER = 256
_DEFAULT = tuple(float(order) for order in dp.rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
_WHOLE = tuple(map(float, (*range(2, 65), *range(72, MAX_INTEGER_ORDER + 1, 8))))
_OBJAX = (1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 4.5, *map(float, range(5, 21)))


@ACCOUNTANTS.register("rdp")
@dataclass(frozen=True)
class Rdp(Accountant):
    """Renyi DP at the library's orders: looser than loss distributions, and quick."""

    orders: ClassVar[tuple[float, ...]] = _DEFAULT
    takes_selection = True

    def supports(self, event: dp.DpEvent) -> str:
        """See `Accountant.supports`."""
        return "the mechanism is bounded at whole Renyi orders only" if events.renyi_only(event) else ""

    def epsilon(
        self, parts: tuple[Part, ...], delta: float, tolerance: float = TOLERANCE
    ) -> tuple[float | None, str]:
        """See `Accountant.epsilon`."""
        return self._bound(self.curve(parts), delta)

    def selected_epsilon(
        self, parts: tuple[Part, ...], delta: float, selection: events.Selection
    ) -> tuple[float | None, str]:
        """See `Accountant.selected_epsilon`: Papernot and Steinke 2022, theorems 2 and 6."""
        # The library's own composition of both; the margins of `curve`, once more around.
        margin = sum(1e-13 * part.times for part in parts)
        one = events.sequence(events.composed(_event(part), part.times) for part in parts)
        return self._bound(_composed(events.selected(one, selection), self.orders) + margin, delta)

    def curve(self, parts: tuple[Part, ...]) -> NDArray[np.float64]:
        """Return Renyi DP of the composition of `parts` at `orders`; inf or NaN where there is none."""
        total = np.zeros(len(self.orders))
        for part in parts:
            # Round-off of the log-space sums, on the safe side; matters only for huge numbers of tiny losses.
            margin = 0.0 if part.sampling_rate == 1.0 else 1e-13
            total += part.times * (_of_one(part, self.orders) + margin)
        return total

    def _bound(self, total: NDArray[np.float64], delta: float) -> tuple[float | None, str]:
        orders = np.array(self.orders)
        usable = np.isfinite(total) & (total >= 0.0)
        if not usable.any():
            return None, "not computable: Renyi DP overflows at every order"
        value, order = self.converted(orders[usable], total[usable], delta)
        if not math.isfinite(value):
            return None, "not computable: no order gives a finite bound"
        loose = value > 0.0 and order == orders[usable][0]
        return value, f"loose: the smallest order, {order:g}, decides" if loose else ""

    def converted(
        self, orders: NDArray[np.float64], total: NDArray[np.float64], delta: float
    ) -> tuple[float, float]:
        """Return (epsilon, the order that gives it) from Renyi DP at each order."""
        value, order = dp.rdp.compute_epsilon(list(orders), list(total), delta)
        return float(value), float(order)


@ACCOUNTANTS.register("rdp_objax")
@dataclass(frozen=True)
class RdpObjax(Rdp):
    """Renyi DP as Objax accounted it: the epsilons that Kurakin et al. 2022 state."""

    orders = _OBJAX
    takes_selection = False

    def converted(
        self, orders: NDArray[np.float64], total: NDArray[np.float64], delta: float
    ) -> tuple[float, float]:
        """See `Rdp.converted`: Mironov 2017, Proposition 3."""
        bounds = total - math.log(delta) / (orders - 1.0)
        return float(bounds.min()), float(orders[bounds.argmin()])


@ACCOUNTANTS.register("rdp_integer")
@dataclass(frozen=True)
class RdpInteger(Rdp):
    """Renyi DP at whole orders: for integer noise, which is bounded there only."""

    orders = _WHOLE

    def supports(self, event: dp.DpEvent) -> str:
        """See `Accountant.supports`: everything."""
        return ""


@functools.lru_cache(maxsize=4096)
def _of_one(part: Part, orders: tuple[float, ...]) -> NDArray[np.float64]:
    """Renyi DP of one release at every order; inf or NaN where the library cannot compute it."""
    return _composed(_event(part), orders)


def _event(part: Part) -> dp.DpEvent:
    """The event of one release, with the multiplier as the library takes it."""
    sigma = part.noise_multiplier / part.examples
    if part.sample is not None and part.sampling_rate < 1.0:
        return dp.SampledWithoutReplacementDpEvent(*part.sample, dp.GaussianDpEvent(sigma))
    return events.gaussian_step(sigma, part.sampling_rate)


def _composed(event: dp.DpEvent, orders: tuple[float, ...]) -> NDArray[np.float64]:
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if events.relation(event) == events.REPLACE:
        relation = dp.NeighboringRelation.REPLACE_ONE
    with _without_library_warnings(), np.errstate(all="ignore"):
        try:
            return np.array(dp.rdp.RdpAccountant(orders, relation).compose(event).rdp)
        except (ArithmeticError, ValueError):
            return np.full(len(orders), np.inf)  # reported as not computable


@contextmanager
def _without_library_warnings() -> Iterator[None]:
    """Drop the library's warning per order that did not converge: such orders are excluded here anyway."""

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger = logging.getLogger("absl")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
