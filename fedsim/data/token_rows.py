"""Target tokens of captions that lie in files: made once by a tokenizer, kept in one file, read by rows.

Of millions of captions neither text nor tokens are held in memory. The file has the number of each token and
one, in the smallest dtype, so that 0 says where none counts. Its name has a digest of what was told apart:
the captions, the tokenizer, the places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.data import byte_pairs
from fedsim.data.chosen import Chosen, Rows
from fedsim.data.pictures import index
from fedsim.data.pictures.index import Index, narrow
from fedsim.data.targets import IGNORED

AT_ONCE = 4096
"""Captions that are in memory at once while the file is made."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """(N, places) int64 target tokens, or IGNORED, as an array to who reads rows of it.

    Attributes:
        table: with the column `tokens` (captions, places); meta has `vocabulary`, how many tokens there are.
        chosen: which captions; None: all, in order.
    """

    table: Index
    chosen: Chosen

    dtype = np.dtype(np.int64)
    ndim = 2

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, places)."""
        return len(self), int(self.table.meta["places"])

    @property
    def vocabulary(self) -> int:
        """How many tokens there can be."""
        return int(self.table.meta["vocabulary"])

    def __getitem__(self, rows: Rows) -> NDArray[np.int64]:
        """Return the tokens of these rows, (n, places)."""
        # Mapped for this alone: pages that were read count as the process's memory while they are.
        found = self.table.column("tokens")[self.chosen.places(rows)].astype(np.int64)
        return np.where(found == 0, IGNORED, found - 1)

    def take(self, rows: Rows) -> TokenRows:
        """Return these rows; none is read."""
        return TokenRows(self.table, self.chosen.take(rows))

    def blocks(self, count: int = AT_ONCE) -> Iterator[NDArray[np.int64]]:
        """Yield all rows in their order, `count` at a time."""
        for start in range(0, len(self), count):
            yield self[start : start + count]


def kept(
    tokenizer: Any, said: Callable[[range], Sequence[str]], count: int, places: int, told: str
) -> TokenRows:
    """Return the target tokens of captions (`byte_pairs.targets`), made now where they are not.

    Args:
        tokenizer: of `byte_pairs`.
        said: gives the captions of some places, "" where there is none.
        count: of captions.
        places: tokens a caption has, its end among them.
        told: what the captions follow from.

    Raises:
        InputError: the cache cannot be written.
    """
    words = hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()
    vocabulary = int(tokenizer.get_vocab_size())
    dtype = narrow(vocabulary)

    def make(handle: BinaryIO) -> None:
        for start in range(0, count, AT_ONCE):
            some = said(range(start, min(start + AT_ONCE, count)))
            found = byte_pairs.targets(tokenizer, some, places)
            handle.write(np.where(found == IGNORED, 0, found + 1).astype(dtype).data)
        column = {"tokens": (dtype.str, [count, places], 0)}
        index.write(
            handle, {}, {"vocabulary": vocabulary, "places": places}, count * places * dtype.itemsize, column
        )

    key = index.key_of((told, words, str(places)))
    table = index.opened(f"captions-{key}.tokens", make)
    return TokenRows(table, Chosen(count))
