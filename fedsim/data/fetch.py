"""Get a data set: `python -m fedsim.data.fetch [fashion_mnist|exam|chem97|spam_assassin|emoji] [--root DIR]`.

Tries what a machine may allow, files that are already there first (fedsim/data/fetching has a file a data
set). Whatever the way, the unpacked or converted files are checked against known sha256 before they are moved
below DIR, so a broken or altered download is never used, and an interrupted one leaves nothing behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.data.datasets import default_root
from fedsim.data.fetching import SETS, FetchFailed, fetch


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; return 0 when the files are in place and 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m fedsim.data.fetch", description="Get a data set.")
    parser.add_argument("name", nargs="?", choices=SETS, default="fashion_mnist", help="which (%(default)s)")
    parser.add_argument(
        "--root", type=Path, default=None, help="data folder (default: $FEDSIM_DATA or ./data)"
    )
    given = parser.parse_args(arguments)
    root: Path = (given.root or default_root()).expanduser().absolute()
    wanted = SETS[given.name]
    try:
        way = fetch(wanted, root)
    except FetchFailed:
        files = ", ".join(wanted.digests)
        first = f"copy {files} (or their .gz files) into {root / wanted.folder} and run this again"
        print(
            f"{wanted.title} could not be fetched; the reasons are above. What you can do:\n"
            + ";\n".join(f"  - {each}" for each in [first, *wanted.otherwise])
            + ".",
            file=sys.stderr,
        )
        return 1
    print(f"{wanted.title} is ready ({way}). Use {wanted.use} data.root={root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
