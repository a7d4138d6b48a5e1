"""`probe`: what the encoder of a run has learned."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedsim.cli import proposals, show
from fedsim.cli.arguments import command, importing


def add(commands: Any) -> None:
    """Register the command."""
    probe = command(
        commands,
        "probe",
        _probe,
        "what the encoder of a run has learned: linear and few-shot probes on frozen features",
        "Beside it, the same architecture as it was drawn, and pixels. Data are pictures with classes, by "
        "default the embedded ones; data with captions, such as the run's own, are told apart by caption.",
    )
    probe.add_argument("run", type=Path, metavar="RUN")
    given = probe.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the data, such as data.name=glyphs data.root=DIR",
    )
    proposals.proposing(given, proposals.overrides)
    probe.add_argument("--shots", type=int, nargs="*", default=[1, 5, 10], metavar="N")
    probe.add_argument("--draws", type=int, default=3, help="of the few examples (default 3)")
    probe.add_argument(
        "--captions", action="store_true", help="tell captions apart, on the run's own evaluation split"
    )
    probe.add_argument("--among", type=int, default=10, help="captions that a picture is shown with")


def _probe(options: argparse.Namespace) -> dict[str, Any]:
    with importing():
        from fedsim import loading
        from fedsim.data import datasets
        from fedsim.run import Run
        from fedsim.study import probe
        from fedsim.validate import InputError

    run = Run(options.run)
    if options.captions:
        if options.overrides:
            raise InputError(
                "--captions looks at the evaluation split that the run was judged by, so no settings of data "
                f"go with it, got {' '.join(options.overrides)}. Leave them out, or leave out --captions."
            )
        splits = datasets.load(loading.loaded(run.config, {}).data)
        said = probe.told_apart(probe.captioner_of(run), splits.test, options.among)
        if not options.json:
            print(
                f"the own caption is the likeliest of {options.among} for {100 * said['right']:.1f} % of "
                f"{said['pictures']:.0f} pictures (chance: {100 * said['chance']:.1f} %)"
            )
        return said
    splits = datasets.load(loading.load("base", options.overrides).data)
    from rich.console import Console

    with Console(stderr=True).status("probes") as status:  # of minutes, and nothing where nobody looks on
        found = probe.probes(run, splits.train, splits.test, options.shots, options.draws, status.update)
    if not options.json:
        heads, *rows = probe.rows_of(found)
        table = show.table(*heads)
        for row in rows:
            table.add_row(*row)
        show.console().print(table)
    return found
