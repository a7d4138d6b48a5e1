"""1,911 small pictures with names, out of the npm package emoji-datasource-google: pictures Apache-2.0, names
MIT."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from fedsim.data.fetching.ways import DataSet, FetchFailed, already_there, npm_package
from fedsim.data.named_pictures import EDGE, NAMES, PIXELS

PACKAGE = "emoji-datasource-google@16.0.0"
# sha256 of the converted files.
DIGESTS = {
    PIXELS: "743daeb95919032a5956d9eb08aec332a40d9dd1bc5d07a21f20b68f77d56a7b",
    NAMES: "38f19af6cf1a4458390bd57defb09b4b56b0c886816980f246fac37de08ae5b7",
}


def by_npm(_: Path, folder: Path) -> Path:
    """The npm package; pictures in the package's own order, their names in lower case."""
    from PIL import Image

    package, out = npm_package(PACKAGE, folder), folder / "converted"
    out.mkdir()
    try:
        held = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
        rows = [(entry["name"].lower(), entry["category"], entry["image"]) for entry in held]
        pixels = np.empty((len(rows), EDGE, EDGE, 4), np.uint8)
        for place, (_name, _category, file) in enumerate(rows):
            with Image.open(package / "img" / "google" / "64" / file) as image:
                pixels[place] = np.asarray(image.convert("RGBA"))
    except (OSError, ValueError, KeyError) as error:
        raise FetchFailed(f"the package {PACKAGE} must hold pictures with names ({error})") from error
    np.save(out / PIXELS, pixels)
    with open(out / NAMES, "w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(("name", "category"))
        table.writerows((name, category) for name, category, _file in rows)
    return out


SET = DataSet(
    title="Emoji",
    folder="emoji",
    digests=DIGESTS,
    ways={"files that are already there": already_there, f"npm package {PACKAGE}": by_npm},
    use="dpcap2024/scenes_cpu",
    otherwise=("run this where npm is, and copy the two files", "use data.options.pictures=shapes"),
)
