"""Make the pictures of docs/img/: what TensorBoard and a comparison's page look like, in a real browser.

    python -m benchmarks.screens [--browser chromium]

Needs Chromium or Chrome. Runs the quickstart at two budgets and a small comparison in a scratch folder, opens
them, and writes PNGs. TensorBoard listens on the loopback address alone, and is ended here.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.executed import ROOT, output

IMAGES = ROOT / "docs" / "img"


def photograph(browser: str, address: str, path: Path, width: int, height: int) -> None:
    """Write what a browser window of this size shows as PNG."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--virtual-time-budget=15000",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                f"--screenshot={path}",
                address,
            ],
            check=True,
            capture_output=True,
            timeout=180,
        )
    print(path.relative_to(ROOT))


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve a folder of runs while the block lasts; give the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    served = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"{address}data/runs") as answer:
                    if answer.read() not in (b"[]", b""):
                        break
            except OSError:
                pass
            time.sleep(0.5)
        yield address
    finally:
        served.terminate()
        served.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make all pictures; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screens", description=__doc__)
    parser.add_argument("--browser", default="chromium")
    browser = shutil.which(parser.parse_args(arguments).browser)
    if browser is None:
        parser.error("no such browser: install Chromium or Chrome, or name it by --browser.")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for budget, rate in ((1, 0.6), (3, 1)):
            given = f"privacy.target_epsilon={budget} optimizer.learning_rate={rate}"
            output(f"fedsim run quickstart {given} --out runs/epsilon-{budget}", folder)
        with tensorboard(folder / "runs") as address:
            photograph(browser, f"{address}#timeseries", IMAGES / "tensorboard.png", 1400, 1000)
            photograph(browser, f"{address}#hparams", IMAGES / "hparams.png", 1400, 700)
        output("fedsim compare compare/quickstart --out compared", folder)
        page = (folder / "compared" / "report.html").as_uri()
        photograph(browser, page, IMAGES / "report.png", 1200, 1400)
        photograph(browser, page, IMAGES / "report_phone.png", 500, 1100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
