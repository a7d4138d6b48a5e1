"""An accountant: zero-concentrated DP, for Gaussian releases in which every unit takes part.

Guarantee: an upper bound. A Gaussian release of noise multiplier sigma is (1 / (2 sigma^2))-zCDP, m examples
of a holder make m^2 of it, releases add up, and rho-zCDP is (rho + 2 sqrt(rho ln(1 / delta)), delta)-DP. It
knows nothing of sampling and refuses events with it, those of integer noise (bounded at whole orders only),
and others than Gaussians; of what it refuses it is not asked.
Source: Bun, Steinke 2016, "Concentrated Differential Privacy: Simplifications, Extensions, and Lower
Bounds", Propositions 1.3, 1.6 and 1.9, Lemma 1.7.
"""

import math
from dataclasses import dataclass

from fedsim.accountants import Accountant
from fedsim.privacy import events


@dataclass(frozen=True)
class Zcdp(Accountant):
    """zCDP of plain Gaussian releases: a closed form, looser than loss distributions."""

    is_upper_bound = True
    check = "pld"

    def supports(self, event):
        """Why there is no answer for an event, or ""."""
        if any(release.sampling_rate < 1.0 for release in events.releases(event)):
            return "zCDP is not amplified by sampling"
        return super().supports(event)

    def epsilon(self, parts, delta, tolerance=0.0):
        """(epsilon, note) of releases of noise multiplier sigma, `times` over, to m examples of a holder."""
        rho = math.fsum(p.times * p.examples**2 / (2.0 * p.noise_multiplier**2) for p in parts)
        return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta)), ""
