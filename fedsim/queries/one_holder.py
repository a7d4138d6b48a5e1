"""A node as it would be if it hosted one of its holders alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.queries.base import NodeView
from fedsim.types import StepTask


class OneHolder:
    """The view of one holder; what it does not narrow is the node's own.

    Args:
        node: that hosts it.
        holder: its id.
        drawn, drawn_holders: what the whole node draws in the step.
    """

    def __init__(
        self, node: NodeView, holder: int, drawn: NDArray[np.int64], drawn_holders: NDArray[np.int64]
    ) -> None:
        self._node = node
        self._drawn, self._drawn_holders = drawn, drawn_holders
        self.holders = np.array([holder], dtype=np.int64)

    def drawn(self, task: StepTask) -> NDArray[np.int64]:
        """Return the holder's examples that the step draws."""
        return self._drawn

    def drawn_holders(self, task: StepTask) -> NDArray[np.int64]:
        """Return the holder, if it is drawn and online."""
        return self._drawn_holders

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def each(node: NodeView, task: StepTask, unit: str, here: NDArray[np.bool_]) -> Iterator[NodeView]:
    """Yield a view of each of the node's holders; those that are not `here` draw nobody."""
    nobody = np.zeros(0, dtype=np.int64)
    ids = node.drawn(task) if unit == "example" else nobody
    drawn = node.drawn_holders(task) if unit == "holder" else nobody
    owners = node.owners(ids)
    for holder, present in zip(node.holders.tolist(), here, strict=True):
        own = ids[owners == holder] if present else nobody
        yield OneHolder(node, holder, own, drawn[drawn == holder] if present else nobody)
