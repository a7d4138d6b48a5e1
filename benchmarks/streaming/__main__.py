"""Pictures on demand: memory against N, views decoded a second, what a step waits for, a million samples.

    python -m benchmarks.streaming --json results/streaming.json [--data FOLDER] [--small]
                                  [--only many]

Makes its data in FOLDER (3 GB; a temporary one by default) from a seed and measures in processes of their
own. `--small` is the same with a tenth of everything. With `--only many` the small samples in tar files alone
are measured, and the other rows of the JSON stay: each part says its commit. On two cores, torch has one
thread beside the decoders' or both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.streaming import made
from benchmarks.streaming.parts import CALLS, arguments_of
from fedsim import provenance

Measured = Callable[..., dict[str, Any]]


def main() -> None:
    """Measure, print a line a row and write the JSON."""
    arguments = _arguments()
    if arguments.call is not None:
        name, *values = arguments.call
        print(json.dumps(CALLS[name](*arguments_of(values))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary if arguments.data is None else arguments.data).absolute()
        rows = _rows(data, arguments.small, bool(arguments.only))
    if arguments.json is not None:
        more = (" --small" if arguments.small else "") + (" --only many" if arguments.only else "")
        said = {
            "command": f"python -m benchmarks.streaming --json {arguments.json}" + more,
            "commit": provenance.commit(),
        }
        if arguments.only:
            held = json.loads(arguments.json.read_text(encoding="utf-8"))
            result = {**held, **rows, "many_by": said}
        else:
            result = {**said, "hardware": provenance.hardware(), **rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _rows(data: Path, small: bool, only_many: bool) -> dict[str, Any]:
    share = 10 if small else 1
    environment = {**os.environ, "FEDSIM_CACHE": str(data / "cache"), "FEDSIM_CALIBRATIONS": "off"}

    def measured(name: str, *values: object) -> dict[str, Any]:
        began = time.perf_counter()
        words = [sys.executable, "-m", "benchmarks.streaming", "--call", name, *map(str, values)]
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name} {values}: {row} ({time.perf_counter() - began:.0f} s)", flush=True)
        return row

    many = {"many": _many(data, share, measured)}
    return many if only_many else {**_folders(data, share, measured), **many}


def _folders(data: Path, share: int, measured: Measured) -> dict[str, Any]:
    """Training on a folder of pictures and on one of a tenth of them, and decoding."""
    counts = [2_000 // share, 20_000 // share]
    began = time.perf_counter()
    whole = made.folder(data / f"imagenet-{counts[1]}", counts[1])
    folders = [made.fewer(data / f"imagenet-{counts[0]}", whole, counts[0]), whole]
    print(f"folders: {time.perf_counter() - began:.0f} s", flush=True)
    files, size = made.size_of(folders[-1])
    training = []
    for model, steps, batch in (("wrn-16-4", 3, 32), ("resnet-18", 4, 64)):
        for place, folder in enumerate(folders):
            for threads in (1, 2) if place == 1 else (1,):
                out = Path(tempfile.mkdtemp(dir=data)) / "run"
                training.append(measured("training", model, folder, out, steps, batch, threads))
    decoding = [
        measured("decoding", folders[0], edge, decode, 400 // share)
        for edge, decode in ((64, "on_demand"), (224, "on_demand"), (64, "packed"))
    ]
    files_of = {"pictures": counts, "files": files, "bytes_a_file": size}
    return {"folder": files_of, "training": training, "decoding": decoding}


def _many(data: Path, share: int, measured: Measured) -> list[dict[str, Any]]:
    """Small samples in tar files, a hundred thousand and a million."""
    many = []
    for count in (100_000 // share, 1_000_000 // share):
        began = time.perf_counter()
        shards = made.shards(data / f"shards-{count}", count)
        print(f"shards: {time.perf_counter() - began:.0f} s", flush=True)
        first = measured("many", shards, count // 100, 1)
        again = measured("many", shards, count // 100, 20)
        again["megabytes"]["first opened"] = first["megabytes"]["opened"]
        many.append({**again, "first": first["seconds_to_open"]})
    fewer, more = many
    more["bytes_a_sample"] = {
        f"{kind}, {moment}": 1e6
        * (more["megabytes"][moment][kind] - fewer["megabytes"][moment][kind])
        / (more["samples"] - fewer["samples"])
        for kind in ("own", "mapped", "peak")
        for moment in ("first opened", "opened", "after draws")
    }
    return many


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, help="folder to make the data in, and keep it")
    parser.add_argument("--small", action="store_true", help="a tenth of everything")
    parser.add_argument(
        "--only", choices=("many",), help="measure these alone, and keep the other rows of --json"
    )
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
