"""What the two roles of the secure sum agree on, and the messages between them.

Stage 1, advertise: each holder sends two public keys and a commitment to the seed of its own mask. The graph
follows from a hash of all of them, so both sides know it and nobody picks it alone. Stage 2, share: each
holder splits that seed and its private mask key between its neighbours, encrypted for each, with a commitment
to every share. Stage 3, mask: each holder sends its vector plus its own mask plus, for every neighbour that
shared, a mask both know, with opposite signs. Stage 4, confirm: each holder certifies to its neighbours whose
vectors it was told arrived. Stage 5, unmask: a holder that `threshold` neighbours certify to be in the sum
reveals, for each neighbour whose vector arrived, the share of the own mask's seed, for each that went silent
after sharing the share of the mask key; never both. The server rebuilds and removes these masks.

Why no story about who dropped helps the server. With t the threshold, m neighbours and c of them corrupt,
2 t > m + c (`graph.least_threshold`): the two secrets of a holder would need 2 t shares, and honest
neighbours give one each, corrupt ones two. And of a holder that reveals anything at least t - c honest
neighbours took its vector for arrived, so that at most m - t + c < t shares of its mask key can come
together: the masks between all who reveal stay, and hide each of them in the sum of all (Bell et al. 2020,
section 4).

What the server checks: every revealed share against its commitment (so a damaged one is named, and made up
for by any other), every rebuilt secret against its holder's advert, and the sum against the bound.

A holder may stop before any stage; the others need not know. Both roles refuse to go on where the result
would reveal more than the sum of at least `least_inputs` holders.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim import digest, validate
from fedsim.secure_sum import keys, shamir
from fedsim.secure_sum.graph import least_threshold, neighbourhoods, width
from fedsim.secure_sum.ring import Ring
from fedsim.validate import InputError, RunError

SEALED_BYTES = 4 * 2 * shamir.LIMBS + 16
"""Size of one encrypted pair of shares."""
TAG_BYTES = 16
"""Size of a commitment to one share, and of one confirmation: what a forger would have to hit by chance."""
DEALT_BYTES = SEALED_BYTES + 2 * TAG_BYTES
"""Size of what stage 2 says about one neighbour: the encrypted pair, and a commitment to each of the two."""
KINDS = ("seed", "mask key")
"""The two secrets of a holder, in the order of a pair of shares."""


@dataclass(frozen=True)
class Settings:
    """What holders and server agree on before the first message; public.

    Attributes:
        holders: n, at least 2; ids are 0 .. n - 1.
        degree: neighbours of a holder, rounded up to an even number; n - 1 or more: all others.
        threshold: shares that rebuild a secret, more than half of the neighbours.
        least_inputs: vectors that must be in the sum, at least 2; fewer are not unmasked.
        bound: largest absolute value in a holder's vector.
        ring: where sums are taken.
        length: entries L of a vector.
    """

    holders: int
    degree: int
    threshold: int
    least_inputs: int
    bound: int
    ring: Ring
    length: int

    def __post_init__(self) -> None:
        if self.holders < 2:
            raise InputError(
                f"a secure sum must have at least 2 holders, got {self.holders}: a sum of one is its "
                "vector. Use more holders or another strategy."
            )
        validate.positive(self.length, "length of the vectors")
        validate.in_range(self.degree, 1, 2**30, "degree of the secure sum")
        least = least_threshold(self.width, 0)
        if not least <= self.threshold <= self.width:
            raise InputError(
                f"the share threshold must be between {least} and {self.width}, more than half of a holder's "
                f"neighbours among {self.holders} holders and at most all, got {self.threshold}. With half, "
                "a server that tells different stories of who dropped learns a vector; with more than all, "
                "nobody learns the sum."
            )
        validate.in_range(self.least_inputs, 2, self.holders, "least number of inputs of the secure sum")
        self.ring.check(self.bound, self.holders)

    @property
    def width(self) -> int:
        """Return how many neighbours a holder has when everybody is there, the most it can have."""
        return width(self.holders, self.degree)


@dataclass(frozen=True)
class Advert:
    """Stage 1, holder to server to neighbours: public keys for encryption and for masks, and a commitment to
    the seed of the own mask, 32 bytes each."""

    channel: bytes
    mask: bytes
    seed: bytes


@dataclass(frozen=True)
class Reveal:
    """Stage 5, holder to server: shares (LIMBS,) uint32 of neighbours' seeds and mask keys, by neighbour."""

    seeds: Mapping[int, NDArray[np.uint32]]
    keys: Mapping[int, NDArray[np.uint32]]


def graph_of(settings: Settings, adverts: Mapping[int, Advert]) -> dict[int, NDArray[np.int64]]:
    """Return the neighbours of every holder that advertised."""
    present = np.array(sorted(adverts), dtype=np.int64)
    said = (adverts[h] for h in present.tolist())
    text = [part for advert in said for part in (advert.channel, advert.mask, advert.seed)]
    key = digest.of([b"secure sum graph", present.tobytes(), *text])
    return _graph(present.tobytes(), settings.degree, key)


@functools.lru_cache(maxsize=4)
def _graph(present: bytes, degree: int, key: bytes) -> dict[int, NDArray[np.int64]]:
    """The holders one process speaks for share one graph; it is read only."""
    return neighbourhoods(np.frombuffer(present, dtype=np.int64), degree, key)


def pair_key(private: bytes, public: bytes, mine: int, other: int) -> bytes:
    """Return the key of the mask that two holders share; the lower id adds it, the higher subtracts it."""
    return keys.agree(private, public, "pair mask", min(mine, other), max(mine, other))


def commitment(seed: bytes) -> bytes:
    """Hides 32 random bytes and binds to them."""
    return digest.of([b"secure sum seed", seed])


def share_commitment(share: NDArray[np.uint32]) -> bytes:
    """Hides the share, whose limbs are uniform on the field, and binds to it."""
    return digest.of([b"secure sum share", share.astype("<u4").tobytes()])[:TAG_BYTES]


def too_few(count: int, least: int) -> RunError:
    return RunError(f"secure sum refused: {count} holders are left, at least {least} must be in the sum.")
