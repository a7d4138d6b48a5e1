"""Exam results by school, out of the Debian package of R's mlmRev: GPL-2 or later, so fetched, never shipped.

Exam: 4,059 pupils of 65 schools in inner London (Goldstein et al. 1993). Chem97: 31,022 pupils of 2,410
schools in England and their A-level in chemistry, 1997 (Fielding, Yang and Goldstein 2003).

Left out are columns computed from other pupils' records (Exam's schavg and vr, averages of a school; Chem97's
gcsecnt, centred by the mean over all): with them a pupil's record would be in other pupils' examples, and a
bound for one example would not be one for a pupil. Exam's intake is left out too: its labels run against the
scores.
"""

from __future__ import annotations

import gzip
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.data.fetching.ways import DataSet, FetchFailed, already_there, debian_package, write_split

PACKAGE = "r-cran-mlmrev"
EXAM = ("school", "normexam", "standLRT", "sex", "schgend")
CHEM97 = ("lea", "school", "student", "score", "gender", "age", "gcsescore")
# sha256 of the converted files.
EXAM_DIGESTS = {
    "train.csv": "1b1761e92bba388eac7dc87b8905e837cc82c655ae8cb93134af995bce164aaf",
    "test.csv": "bc801dc17ae10ae2d3263e0b39cb3c00a29a91c846fd6902cdbbe2112af3ceb6",
}
CHEM97_DIGESTS = {
    "train.csv": "45515d210a0250b7fbd662867e3e9776202d824c2b8cd3732737c92530aff873",
    "test.csv": "30c64f0838f342e4ad28efa1a628fddc2bf2e6cd98ebef3af8276818b61bfc2c",
}


def frame(database: Path, name: str) -> Mapping[str, Sequence[Any]]:
    """Return the columns of a data frame in a database of R's lazy loading (Rdata.rdb and Rdata.rdx).

    The index is a compressed R object: name -> (offset, length) of a chunk of the database, which is 4 bytes
    of size, then an R object compressed by zlib.

    Args:
        database: path without its ending.
        name: of the data frame.

    Raises:
        FetchFailed: the package rdata is not installed, or the files are not of this form.
    """
    try:
        import rdata
    except ImportError as error:
        raise FetchFailed(
            f"R's data need the package rdata ({error}): pip install 'fedsim[fetch]'"
        ) from error

    def read(content: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is told no file type
            return rdata.conversion.convert(rdata.parser.parse_data(content))

    try:
        index = read(gzip.decompress(database.with_suffix(".rdx").read_bytes()))
        offset, length = (int(each) for each in index["variables"][name])
        chunk = database.with_suffix(".rdb").read_bytes()[offset : offset + length]
        content = zlib.decompress(chunk[4:])
        if len(content) != int.from_bytes(chunk[:4], "big"):
            raise ValueError(f"{len(content)} bytes")
        found = read(content)
        return {str(column): found[column].tolist() for column in found.columns}
    except Exception as error:  # rdata's own errors are of many types
        raise FetchFailed(
            f"{database.name} must hold {name} as R stores it: {type(error).__name__}: {error}"
        ) from error


def _converted(name: str, columns: Sequence[str], folder: Path) -> Path:
    database = debian_package(PACKAGE, folder) / "usr/lib/R/site-library/mlmRev/data/Rdata"
    found = frame(database, name)
    lacking = [column for column in columns if column not in found]
    if lacking:
        raise FetchFailed(f"{name} has no column {', '.join(lacking)}, but {', '.join(found)}")
    rows = list(zip(*(found[column] for column in columns), strict=True))
    # By pupil: the row, since pupils' numbers are not unique in Exam.
    write_split(folder / "converted", columns, rows, [f"{name} {row}" for row in range(len(rows))])
    return folder / "converted"


def exam(_: Path, folder: Path) -> Path:
    """Exam out of the Debian package."""
    return _converted("Exam", EXAM, folder)


def chem97(_: Path, folder: Path) -> Path:
    """Chem97 out of the Debian package."""
    return _converted("Chem97", CHEM97, folder)


_OTHERWISE = (
    "run this where apt-get, dpkg-deb and the package rdata are, and copy the two files",
    "install rdata: pip install 'fedsim[fetch]'",
)
EXAM_SET = DataSet(
    title="Exam",
    folder="exam",
    digests=EXAM_DIGESTS,
    ways={"files that are already there": already_there, f"Debian package {PACKAGE}": exam},
    use="tabular/exam",
    otherwise=_OTHERWISE,
)
CHEM97_SET = DataSet(
    title="Chem97",
    folder="chem97",
    digests=CHEM97_DIGESTS,
    ways={"files that are already there": already_there, f"Debian package {PACKAGE}": chem97},
    use="tabular/chem97",
    otherwise=_OTHERWISE,
)
