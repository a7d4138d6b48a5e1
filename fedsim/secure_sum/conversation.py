"""The five stages of a secure sum, as nodes and a server hold them by arrays (fedsim.secure_sum.protocol).

The server asks every node for one stage after the other, and tells each what came of those before; a node
speaks for those of its holders that still answer. Who answers, what a holder's vector is and how few inputs
are too few is told from outside (fedsim.strategies.shares).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.secure_sum import arrays as messages
from fedsim.secure_sum import shamir
from fedsim.secure_sum.holder import Holder
from fedsim.secure_sum.protocol import (
    DEALT_BYTES,
    SEALED_BYTES,
    TAG_BYTES,
    Advert,
    Reveal,
    Settings,
    graph_of,
)
from fedsim.secure_sum.server import Server
from fedsim.seeds import derive
from fedsim.types import HolderReply, StepTask

STAGES = ("advertise", "share", "", "confirm", "unmask")
"""In order; the third, of the masked vectors, is the stage that every trust model has."""
Arrays = dict[str, NDArray[Any]]


class Speakers:
    """The holders of one node that still answer, at one stage.

    Args:
        settings: of the secure sum.
        task: the server's.
        holders: ids of all holders of the node, (H,).
        here: which of them answer, (H,).
    """

    def __init__(
        self, settings: Settings, task: StepTask, holders: NDArray[np.int64], here: NDArray[np.bool_]
    ) -> None:
        self.settings, self._task, self._here = settings, task, here
        self._rows = rows = holders.tolist()
        self._speakers = {
            rows[i]: Holder(rows[i], settings, derive(task.keys["holders"], "session", rows[i]))
            for i in np.flatnonzero(here)
        }
        sent, self._everyone = task.arrays, np.arange(settings.holders)
        self._adverts: dict[int, Advert] = {}
        self._graph: dict[int, NDArray[np.int64]] = {}
        self._shared: set[int] = set()
        if task.stage == "advertise":
            return
        self._adverts = messages.unpack_adverts(sent["public"], sent["advertised"], self._everyone)
        self._graph = graph_of(settings, self._adverts)
        if task.stage != "share":
            self._shared = set(np.flatnonzero(sent["shared"]).tolist())

    def answer(self) -> Arrays:
        """Return what they say at any stage but that of the masked vectors, one row a holder of the node."""
        task, sent, here, rows = self._task, self._task.arrays, self._here, self._rows
        adverts, graph, shared = self._adverts, self._graph, self._shared
        speakers, width = self._speakers, self.settings.width
        if task.stage == "advertise":
            public = {h: speaker.advertise() for h, speaker in speakers.items()}
            return {"here": here, "public": messages.pack_adverts(public, rows)}
        if task.stage == "share":
            dealt = {h: speaker.share(adverts) for h, speaker in speakers.items()}
            packed = messages.pack_pairs(dealt, graph, rows, width, DEALT_BYTES)
            return {"here": here, "dealt": packed}
        arrived = set(np.flatnonzero(sent["arrived"]).tolist())
        if task.stage == "confirm":
            told = {h: speaker.confirm(adverts, shared, arrived) for h, speaker in speakers.items()}
            packed = messages.pack_pairs(told, graph, rows, width, TAG_BYTES)
            return {"here": here, "confirmations": packed}
        everyone = self._everyone
        sealed = messages.unpack_pairs(sent["sealed"], sent["shared"], everyone, graph)
        said = messages.unpack_pairs(sent["confirmations"], sent["confirmed"], everyone, graph, arrived)
        inbound, confirmed = messages.by_receiver(sealed), messages.by_receiver(said)
        reveals = {
            h: speaker.unmask(adverts, shared, arrived, inbound.get(h, {}), confirmed.get(h, {}))
            for h, speaker in speakers.items()
        }
        return {"here": here, "shares": messages.pack_reveals(reveals, graph, rows, width)}

    def masked(self, vector: Callable[[int, int], NDArray[np.int64]]) -> Arrays:
        """Return their masked vectors, one row a holder of the node.

        Args:
            vector: (row, holder) -> the holder's vector, (L,).
        """
        masked = np.zeros((len(self._rows), self.settings.length), dtype=self.settings.ring.dtype)
        for row, holder in enumerate(self._rows):
            if holder in self._speakers:
                values = vector(row, holder)
                masked[row] = self._speakers[holder].mask(values, self._adverts, self._shared)
        return {"here": self._here, "masked": masked}


@dataclass(frozen=True)
class Summed:
    """What the server has at the end.

    Attributes:
        total: sum over the holders whose vectors arrived, int64 (L,).
        survivors: how many those are.
        damaged: as of `Server`.
        replies: those of the stage of the masked vectors.
    """

    total: NDArray[np.int64]
    survivors: int
    damaged: list[tuple[int, int]]
    replies: list[HolderReply]


def summed(
    settings: Settings,
    along: Mapping[str, NDArray[Any]],
    ask: Callable[[str, Mapping[str, NDArray[Any]]], list[HolderReply]],
    check: Callable[[int], None],
) -> Summed:
    """Run the five stages at the server.

    Args:
        settings: of the secure sum.
        along: what nodes are told at every stage.
        ask: asks every node for a stage.
        check: is told how many holders are left after each of the first three stages, and may refuse.

    Raises:
        RunError: as of `Server`.
    """
    width = settings.width
    everyone = list(range(settings.holders))
    server = Server(settings)
    along = dict(along)

    adverts: dict[int, Advert] = {}
    for r in ask("advertise", along):
        adverts |= messages.unpack_adverts(r.arrays["public"], r.arrays["here"], r.holders)
    check(len(adverts))
    server.take_adverts(adverts)
    along |= {"advertised": _mask(adverts, everyone), "public": messages.pack_adverts(adverts, everyone)}

    dealt: dict[int, dict[int, bytes]] = {}
    for r in ask("share", along):
        dealt |= messages.unpack_pairs(r.arrays["dealt"], r.arrays["here"], r.holders, server.neighbours)
    check(len(dealt))
    server.take_shares(dealt)
    along |= {"shared": _mask(server.sealed, everyone)}

    replies = ask("", along)
    masked: dict[int, NDArray[Any]] = {}
    for r in replies:
        masked |= {int(r.holders[i]): r.arrays["masked"][i] for i in np.flatnonzero(r.arrays["here"])}
    check(len(masked))
    server.take_masked(masked)
    survivors = len(server.masked)
    along |= {"arrived": _mask(server.masked, everyone)}

    confirmed: dict[int, dict[int, bytes]] = {}
    near, shared, arrived = server.neighbours, set(server.sealed), set(server.masked)
    for r in ask("confirm", along):
        here, said = r.arrays["here"], r.arrays["confirmations"]
        confirmed |= messages.unpack_pairs(said, here, r.holders, near, arrived)
    server.take_confirmations(confirmed)
    along |= {
        "confirmed": _mask(server.confirmed, everyone),
        "confirmations": messages.pack_pairs(server.confirmed, near, everyone, width, TAG_BYTES),
        "sealed": messages.pack_pairs(server.sealed, near, everyone, width, SEALED_BYTES),
    }

    reveals: dict[int, Reveal] = {}
    for r in ask("unmask", along):
        here, shares = r.arrays["here"], r.arrays["shares"]
        reveals |= messages.unpack_reveals(shares, here, r.holders, near, shared, arrived)
    return Summed(server.total(reveals), survivors, server.damaged, replies)


def expected(settings: Settings, stage: str, rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return shape and dtype of the arrays that a node of so many holders answers a stage with."""
    byte = np.dtype(np.uint8)
    body: Mapping[str, dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = {
        "advertise": {"public": ((rows, 3, 32), byte)},
        "share": {"dealt": ((rows, settings.width, DEALT_BYTES), byte)},
        "": {"masked": ((rows, settings.length), settings.ring.dtype)},
        "confirm": {"confirmations": ((rows, settings.width, TAG_BYTES), byte)},
        "unmask": {"shares": ((rows, settings.width, shamir.LIMBS), np.dtype(np.uint32))},
    }
    return {"here": ((rows,), np.dtype(np.bool_)), **body[stage]}


def _mask(present: Mapping[int, Any], everyone: list[int]) -> NDArray[np.bool_]:
    return np.array([holder in present for holder in everyone])
