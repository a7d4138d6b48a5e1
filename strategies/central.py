"""Central trust: the server adds the holders' sums, and the noise once.

Who is trusted: the server, with the exact sum of clipped contributions (it adds the noise); holders do not
trust each other. What is sent: one sum a node and step. Where noise is added: once, at the server, on the sum
over all holders. Event: one Gaussian release a cycle of the sampler, amplified by it (one a step under
Poisson sampling). Dropout policy: a node that fails is asked once more with the same keys; then the run
stops, because a sum without it would not be the mechanism that was accounted. Holders that are offline by the
availability model are ordinary: they contribute nothing to that step, the noise stays full, and accounting
them as present is an upper bound (fedsim.samplers.keyed).

With gradients, Poisson sampling and fresh noise this is exactly centralized DP-SGD, with the data left where
it is.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.strategies import STRATEGIES
from fedsim.strategies.base import Trust


@STRATEGIES.register("central")
@dataclass(frozen=True)
class Central(Trust):
    """The server sees the exact sum and adds the noise once."""

    trusted = "server (sees the exact sum)"
    sent = "sum of clipped {what}"
    noise_added = "server, once, on the sum"
    dropout_policy = "ask once more with the same keys, then stop"
