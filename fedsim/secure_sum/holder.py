"""A holder's side of the secure sum (fedsim.secure_sum.protocol)."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import seeds
from fedsim.secure_sum import keys, shamir
from fedsim.secure_sum.protocol import (
    TAG_BYTES,
    Advert,
    Reveal,
    Settings,
    commitment,
    graph_of,
    pair_key,
    share_commitment,
    too_few,
)
from fedsim.validate import InputError, RunError

SHARE_SHAPE = (2, shamir.LIMBS)


@dataclass(frozen=True)
class Holder:
    """One holder in one session. All it knows follows from `secret`, so any process can speak for it.

    Its messages follow from what it is asked, so it must not be asked two things: whoever rebuilds it from
    its secret remembers what a session was told and refuses to hear something else (fedsim.engine.asked).

    Attributes:
        index: its id, 0 .. n - 1.
        settings: of the session.
        secret: 32 bytes known to nobody else and used for this session alone.
    """

    index: int
    settings: Settings
    secret: bytes = field(repr=False)

    def advertise(self) -> Advert:
        """Stage 1: return the public keys and the commitment to the seed."""
        channel, mask = (keys.public_of(self._private(purpose)) for purpose in ("channel", "mask"))
        return Advert(channel, mask, commitment(self._seed))

    def share(self, adverts: Mapping[int, Advert]) -> dict[int, bytes]:
        """Stage 2: return, for each neighbour, one encrypted pair of shares (own seed, own mask key) and a
        commitment to each, DEALT_BYTES together.

        Raises:
            RunError: fewer neighbours than the threshold are there, or its own advert was changed.
        """
        neighbours = self._neighbours(adverts)
        if len(neighbours) < self.settings.threshold:
            raise RunError(
                f"secure sum refused: holder {self.index} has {len(neighbours)} neighbours, below the share "
                f"threshold {self.settings.threshold}."
            )
        secrets = [self._seed, self._private("mask")]
        coefficients = seeds.derive(self.secret, "share coefficients")
        shares = shamir.share(secrets, neighbours + 1, self.settings.threshold, coefficients)
        out: dict[int, bytes] = {}
        for row, other in zip(shares, neighbours.tolist(), strict=True):
            key = self._channel_key(adverts, self.index, other)
            sealed = keys.seal(key, row.astype("<u4").tobytes(), _context(self.index, other))
            out[other] = sealed + share_commitment(row[0]) + share_commitment(row[1])
        return out

    def mask(
        self, values: NDArray[np.int64], adverts: Mapping[int, Advert], shared: Collection[int]
    ) -> NDArray[Any]:
        """Stage 3: return the masked vector (L,) of ring elements.

        Args:
            values: (L,) int64, within the bound.
            shared: ids of the holders whose shares arrived.

        Raises:
            RunError: a value beyond the bound, or its own advert was changed.
            InputError: another length.
        """
        if values.shape != (self.settings.length,):
            raise InputError(
                f"vector of holder {self.index} must have length {self.settings.length}, got {values.shape}."
            )
        ring = self.settings.ring
        total = ring.encode(values, self.settings.bound).copy()
        keys.add_mask(total, self._seed, ring)
        for other in sorted(set(self._neighbours(adverts).tolist()).intersection(shared)):
            key = pair_key(self._private("mask"), adverts[other].mask, self.index, other)
            keys.add_mask(total, key, ring, subtract=self.index > other)
        return total

    def confirm(
        self, adverts: Mapping[int, Advert], shared: Collection[int], arrived: Collection[int]
    ) -> dict[int, bytes]:
        """Stage 4: return, for each neighbour whose vector arrived, a certificate of that for it alone.

        Raises:
            RunError: fewer vectors than `least_inputs`, or ids that contradict each other.
        """
        self._check_story(shared, arrived)
        near = sorted(set(self._neighbours(adverts).tolist()).intersection(arrived))
        return {other: self._confirmation(adverts, self.index, other) for other in near}

    def unmask(
        self,
        adverts: Mapping[int, Advert],
        shared: Collection[int],
        arrived: Collection[int],
        inbound: Mapping[int, bytes],
        confirmed: Mapping[int, bytes],
    ) -> Reveal:
        """Stage 5: reveal one share a neighbour, of the seed where its vector arrived, else of the key.

        A share that was changed on its way is left out; the server notices, and who else holds one helps out.

        Args:
            shared: ids whose shares arrived in stage 2.
            arrived: ids whose masked vectors arrived, a subset of `shared` with this holder.
            inbound: encrypted shares from neighbours in `shared`, by sender.
            confirmed: what neighbours certified to this holder in stage 4, by sender.

        Raises:
            RunError: fewer vectors than `least_inputs`, ids that contradict each other, fewer certificates
                than the threshold.
        """
        self._check_story(shared, arrived)
        near = set(self._neighbours(adverts).tolist())
        valid = sum(
            confirmed[other] == self._confirmation(adverts, other, self.index)
            for other in near.intersection(confirmed)
        )
        if valid < self.settings.threshold:
            raise RunError(
                f"secure sum refused: {valid} neighbours confirm that holder {self.index} is in the sum, "
                f"{self.settings.threshold} are needed."
            )
        revealed: tuple[dict[int, NDArray[np.uint32]], dict[int, NDArray[np.uint32]]] = ({}, {})
        for other in sorted(near.intersection(shared).intersection(inbound)):
            key = self._channel_key(adverts, other, self.index)
            text = keys.unseal(key, inbound[other], _context(other, self.index))
            if text is not None:
                pair = np.frombuffer(text, dtype="<u4").reshape(SHARE_SHAPE)
                kind = 0 if other in arrived else 1
                revealed[kind][other] = pair[kind].astype(np.uint32)
        return Reveal(*revealed)

    def _check_story(self, shared: Collection[int], arrived: Collection[int]) -> None:
        if len(set(arrived)) < self.settings.least_inputs:
            raise too_few(len(set(arrived)), self.settings.least_inputs)
        if not set(arrived) <= set(shared) or self.index not in arrived:
            raise RunError(f"secure sum refused: holder {self.index} was told an impossible set of inputs.")

    def _private(self, purpose: str) -> bytes:
        return self._privates[purpose]

    @functools.cached_property
    def _privates(self) -> dict[str, bytes]:
        own = {p: seeds.derive(self.secret, f"private {p} key") for p in ("channel", "mask")}
        return own | {"own mask": seeds.derive(self.secret, "own mask")}

    @property
    def _seed(self) -> bytes:
        return self._privates["own mask"]

    def _neighbours(self, adverts: Mapping[int, Advert]) -> NDArray[np.int64]:
        if adverts.get(self.index) != self.advertise():
            raise RunError(f"secure sum refused: the advert of holder {self.index} was changed on its way.")
        return graph_of(self.settings, adverts)[self.index]

    def _channel_key(self, adverts: Mapping[int, Advert], sender: int, receiver: int) -> bytes:
        return self._agreed(adverts, "share channel", sender, receiver)

    def _confirmation(self, adverts: Mapping[int, Advert], sender: int, receiver: int) -> bytes:
        """What only the two can make: the receiver's vector arrived, says the sender."""
        return self._agreed(adverts, "vector arrived", sender, receiver)[:TAG_BYTES]

    def _agreed(self, adverts: Mapping[int, Advert], purpose: str, sender: int, receiver: int) -> bytes:
        other = receiver if sender == self.index else sender
        try:
            return keys.agree(self._private("channel"), adverts[other].channel, purpose, sender, receiver)
        except RunError as error:
            raise RunError(f"holder {other}: {error}") from error


def _context(sender: int, receiver: int) -> bytes:
    return f"secure sum share {sender} {receiver}".encode()
