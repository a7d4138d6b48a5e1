"""The server's side of the secure sum (fedsim.secure_sum.protocol)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.secure_sum import keys, shamir
from fedsim.secure_sum.protocol import (
    KINDS,
    SEALED_BYTES,
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
from fedsim.validate import RunError


class Server:
    """The server in one session: what it was sent, and the sum it can make of it.

    Stages are given in order; each takes the messages that came, by holder, and drops the silent.

    Attributes:
        damaged: after `total`, (by, owner) of every share that holder `by` revealed otherwise than its owner
            dealt it, or could not open.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.adverts: dict[int, Advert] = {}
        self.neighbours: dict[int, NDArray[np.int64]] = {}
        self.sealed: dict[int, dict[int, bytes]] = {}
        self.masked: dict[int, NDArray[Any]] = {}
        self.confirmed: dict[int, dict[int, bytes]] = {}
        self.damaged: list[tuple[int, int]] = []
        self._promised: dict[int, dict[int, bytes]] = {}

    def take_adverts(self, adverts: Mapping[int, Advert]) -> None:
        """Stage 1. Raises RunError where too few came for any sum."""
        self.adverts = dict(sorted(adverts.items()))
        self._require(len(adverts))
        self.neighbours = graph_of(self.settings, self.adverts)
        self._require_neighbours(self.adverts)

    def take_shares(self, dealt: Mapping[int, Mapping[int, bytes]]) -> None:
        """Stage 2: sender -> receiver -> message. Raises RunError where too few shared.

        The commitments stay here, the encrypted shares (`sealed`) go on.
        """
        for sender in sorted(set(dealt).intersection(self.adverts)):
            self.sealed[sender] = {to: text[:SEALED_BYTES] for to, text in dealt[sender].items()}
            self._promised[sender] = {to: text[SEALED_BYTES:] for to, text in dealt[sender].items()}
        self._require(len(self.sealed))
        self._require_neighbours(self.sealed)

    def inbound(self, holder: int) -> dict[int, bytes]:
        """Return the messages for one holder, by sender."""
        near = self.neighbours[holder].tolist()
        return {other: self.sealed[other][holder] for other in near if other in self.sealed}

    def take_masked(self, masked: Mapping[int, NDArray[Any]]) -> None:
        """Stage 3. Raises RunError where fewer vectors than `least_inputs` came."""
        self.masked = {h: masked[h] for h in sorted(masked) if h in self.sealed}
        self._require(len(self.masked))

    def take_confirmations(self, confirmed: Mapping[int, Mapping[int, bytes]]) -> None:
        """Stage 4: sender -> receiver -> certificate. Raises RunError where too few confirmed."""
        self.confirmed = {h: dict(confirmed[h]) for h in sorted(confirmed) if h in self.masked}
        self._require(len(self.confirmed))
        self._require_neighbours(self.confirmed)

    def confirmations(self, holder: int) -> dict[int, bytes]:
        """Return the certificates for one holder, by sender."""
        return {other: told[holder] for other, told in self.confirmed.items() if holder in told}

    def total(self, reveals: Mapping[int, Reveal]) -> NDArray[np.int64]:
        """Stage 5: return the sum over all holders whose vectors arrived, int64 (L,).

        Raises:
            RunError: some secret has fewer good shares than the threshold, or good shares that do not give
                what its holder advertised; an entry of the sum is above what so many vectors can give.
        """
        self.damaged = []
        ring = self.settings.ring
        total = np.zeros(self.settings.length, dtype=ring.dtype)
        for vector in self.masked.values():
            np.add(total, vector, out=total)
        for holder in self.masked:
            keys.add_mask(total, self._rebuild(holder, reveals, 0), ring, subtract=True)
        for gone in sorted(set(self.sealed) - set(self.masked)):
            near = [h for h in self.neighbours[gone].tolist() if h in self.masked]
            if not near:
                continue  # nobody's vector holds a mask of this pair
            private = self._rebuild(gone, reveals, 1)
            for other in near:
                key = pair_key(private, self.adverts[other].mask, gone, other)
                keys.add_mask(total, key, ring, subtract=other < gone)
        values = ring.decode(total)
        limit = self.settings.bound * len(self.masked)
        if (largest := max(int(values.max(initial=0)), -int(values.min(initial=0)))) > limit:
            raise RunError(
                f"secure sum: an entry of the sum is {largest}, {len(self.masked)} vectors within the bound "
                f"give at most {limit}. A masked vector was changed on its way, or masked with another mask."
            )
        return values

    def _rebuild(self, owner: int, reveals: Mapping[int, Reveal], kind: int) -> bytes:
        """Return a secret of `owner` from `threshold` of the shares that are what it committed to."""
        good: dict[int, NDArray[np.uint32]] = {}
        for by in self.neighbours[owner].tolist():
            if by not in reveals:
                continue  # silent
            share = (reveals[by].seeds, reveals[by].keys)[kind].get(owner)
            promised = self._promised[owner][by][TAG_BYTES * kind : TAG_BYTES * (kind + 1)]
            if share is not None and share_commitment(share) == promised:
                good[by] = share
            else:
                self.damaged.append((by, owner))
        need = self.settings.threshold
        if len(good) < need:
            bad = [by for by, of in self.damaged if of == owner]
            cause = f"Those of holders {bad} were damaged." if bad else "Too many holders dropped out."
            raise RunError(
                f"secure sum refused: {len(good)} shares of holder {owner}'s {KINDS[kind]} came, {need} are "
                f"needed. {cause}"
            )
        advert, chosen = self.adverts[owner], list(good)[:need]
        rows = np.stack([good[by] for by in chosen])[:, None, :]
        dealt_badly = RunError(
            f"secure sum refused: the shares that holder {owner} dealt do not give its {KINDS[kind]}."
        )
        try:
            secret = shamir.combine(rows, np.array(chosen, dtype=np.int64) + 1)[0]
        except RunError as error:
            raise dealt_badly from error
        told = (commitment(secret), advert.seed) if kind == 0 else (keys.public_of(secret), advert.mask)
        if told[0] != told[1]:
            raise dealt_badly
        return secret

    def _require(self, count: int) -> None:
        if count < self.settings.least_inputs:
            raise too_few(count, self.settings.least_inputs)

    def _require_neighbours(self, alive: Collection[int]) -> None:
        """Every secret must have `threshold` receivers among the living."""
        present = set(alive)
        for holder in present:
            near = len(present.intersection(self.neighbours[holder].tolist()))
            if near < self.settings.threshold:
                raise RunError(
                    f"secure sum refused: holder {holder} keeps {near} neighbours, below the share threshold "
                    f"{self.settings.threshold}. Too many holders dropped out."
                )
