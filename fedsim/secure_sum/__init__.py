"""Secure sum: the server learns the sum of integer vectors modulo 2^bits and nothing else about them.

Protocol of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning") on
the sparse random graph of Bell et al. 2020 ("Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead"), with the latter's confirmation by neighbours: against a server that looks at everything and may
lie about who dropped out, together with a stated share of the holders. The result checks itself: shares,
secrets and the size of the sum are held against commitments and bounds, so that a damaged message is named
and either made up for or stops the sum. Not covered: a server that lies about public keys (that needs
signatures and somebody who vouches for them), and holders that send wrong values within the bound.
"""

from __future__ import annotations

from fedsim.secure_sum.graph import SafeGraph, check_threshold, neighbourhoods, safe_graph
from fedsim.secure_sum.holder import Holder
from fedsim.secure_sum.protocol import Advert, Reveal, Settings
from fedsim.secure_sum.ring import Ring
from fedsim.secure_sum.server import Server

__all__ = [
    "Advert",
    "Holder",
    "Reveal",
    "Ring",
    "SafeGraph",
    "Server",
    "Settings",
    "check_threshold",
    "neighbourhoods",
    "safe_graph",
]
