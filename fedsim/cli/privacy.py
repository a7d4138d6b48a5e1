"""`epsilon` and `calibrate`: what settings or a run's ledger spend, and the noise a budget needs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fedsim import validate
from fedsim.cli import show
from fedsim.cli.arguments import command, importing
from fedsim.validate import InputError


def add(commands: Any) -> None:
    """Register the commands."""
    epsilon = command(
        commands,
        "epsilon",
        _epsilon,
        "epsilon of a run's ledger, of given settings, or of the published recipes",
        "Give a run folder or ledger file; or --noise-multiplier, --steps and --sampling-rate (or "
        "--population and --batch); or --published [TEXT] for the table of published settings.",
    )
    epsilon.add_argument("ledger", nargs="?", type=Path, metavar="LEDGER_OR_RUN")
    epsilon.add_argument(
        "--published", nargs="?", const="", metavar="TEXT", help="rows whose paper or setting has TEXT"
    )
    epsilon.add_argument("--noise-multiplier", type=float, metavar="SIGMA", help="noise std over sensitivity")
    _mechanism_arguments(epsilon)

    calibrate = command(
        commands, "calibrate", _calibrate, "the noise multiplier that reaches a target epsilon, checked twice"
    )
    calibrate.add_argument("--target-epsilon", type=float, required=True)
    _mechanism_arguments(calibrate)


def _mechanism_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sampling-rate", type=float, metavar="Q", help="chance of an example to be in a step"
    )
    parser.add_argument("--population", type=float, metavar="N", help="examples, with --batch instead of Q")
    parser.add_argument("--batch", type=float, metavar="B", help="expected batch size")
    parser.add_argument("--steps", type=int, metavar="T")
    parser.add_argument("--delta", type=float, help="default: that of the ledger, else 1e-5")
    parser.add_argument(
        "--accountant", default="pld", help="a name of `fedsim list`, or package.module:Object"
    )
    parser.add_argument("--holder-examples", type=int, metavar="M", help="also for a holder of M examples")


def _epsilon(options: argparse.Namespace) -> Any:
    if options.published is not None:
        if options.ledger is not None:
            validate.conflicts(
                f"--published shows published settings, and {options.ledger} is taken for a run.",
                "Give one of the two; a TEXT with blanks goes into quotes.",
            )
        return _published(options)
    if options.holder_examples is not None:
        from fedsim import rules

        validate.in_range(options.holder_examples, 1, rules.MOST, "--holder-examples")
    if options.ledger is not None:
        answer = _ledger_epsilon(options)
    else:
        answer = _settings_epsilon(options)
    if not options.json:
        for name, spent in answer["epsilon"].items():
            print(f"{name}: {show.spent(spent)}")
    return answer


def _ledger_epsilon(options: argparse.Namespace) -> dict[str, Any]:
    with importing():
        from fedsim.engine.run_folder import RunFolder
        from fedsim.privacy import ledger

    path = RunFolder(options.ledger).ledger if options.ledger.is_dir() else options.ledger
    book = ledger.read(path)
    delta = book.header.delta if options.delta is None else options.delta
    validate.in_range(delta, 1e-300, 0.5, "--delta")
    kinds = dict.fromkeys(["pld", "rdp", options.accountant])
    example = {f"{book.header.unit}, {name}": book.epsilon(name, delta) for name in kinds}
    size = options.holder_examples
    size = book.header.examples_per_holder_at_most if size is None else size
    if size is None and book.header.unit == "example" and not options.json:
        print("holder: no federation.examples_per_holder_at_most was declared; give --holder-examples")
    holder = {} if size is None else {f"holder of {size}": book.holder_epsilon(size, delta)}
    return {"ledger": str(path), "steps": book.steps, "epsilon": {**example, **holder}}


def _settings_epsilon(options: argparse.Namespace) -> dict[str, Any]:
    with importing():
        from fedsim import rules
        from fedsim.privacy import accountant, events

    if options.noise_multiplier is None or options.steps is None:
        raise InputError(
            "epsilon needs a run folder or ledger, --published, or --noise-multiplier with --steps and "
            "--sampling-rate (or --population and --batch)."
        )
    validate.in_range(options.noise_multiplier, *rules.REAL, "--noise-multiplier")
    rate, steps, delta = _mechanism(options)
    total = events.composed(events.gaussian_step(options.noise_multiplier, rate), steps)
    kinds = list(dict.fromkeys(["pld", "rdp", options.accountant]))
    answer = {kind: accountant.epsilon(total, delta, kind, "example") for kind in kinds}
    if options.population is not None:
        answer = {kind: spent.among(int(options.population)) for kind, spent in answer.items()}
    if options.holder_examples:
        answer[f"holder of {options.holder_examples}"] = accountant.holder_epsilon(
            options.noise_multiplier, rate, steps, delta, options.holder_examples
        )
    return {"sampling_rate": rate, "steps": steps, "epsilon": answer}


def _mechanism(options: argparse.Namespace) -> tuple[float, int, float]:
    """Return (sampling rate, steps, delta) from the command line."""
    from fedsim import rules
    from fedsim.samplers.keyed import sampling_rate

    if (options.sampling_rate is None) == (options.population is None or options.batch is None):
        raise InputError("give either --sampling-rate, or --population together with --batch.")
    if options.steps is None:
        raise InputError("give --steps, the number of server updates.")
    validate.in_range(options.steps, 1, rules.MOST, "--steps")
    for size, name in ((options.population, "--population"), (options.batch, "--batch")):
        if size is not None:
            validate.positive(size, name)
    if options.sampling_rate is None and options.batch > options.population:
        raise InputError(
            f"--batch must be at most --population, {options.population:g}, got {options.batch:g}. It is the "
            "expected number of examples in a step; all of them are a full batch."
        )
    delta = 1e-5 if options.delta is None else options.delta
    validate.in_range(delta, 1e-300, 0.5, "--delta")
    if options.sampling_rate is not None:
        validate.in_range(options.sampling_rate, 1e-300, 1.0, "--sampling-rate")
        return options.sampling_rate, options.steps, delta
    return sampling_rate(options.batch, options.population, 1.0), options.steps, delta


def _published(options: argparse.Namespace) -> Any:
    with importing():
        from fedsim.privacy import published

    wanted = options.published.lower()
    rows = [r for r in published.rows() if wanted in f"{r.paper} {r.setting}".lower()]
    if not rows:
        raise InputError(f"no published setting contains {options.published!r}. Leave TEXT out to see all.")
    compared = published.compare(rows)
    if not options.json:
        table = show.table("paper", "setting", "published", "RDP", "PLD", "Objax RDP", "N x delta", "status")
        for item in compared:
            values = (item.row.epsilon_published, item.rdp.value, item.pld.value)
            objax = None if item.rdp_objax is None else item.rdp_objax.value
            shown = [show.value(value) for value in (*values, objax)]
            shown[0] += " (differs)" if item.differs else ""
            n_delta = f"{item.row.population * item.row.delta:.2g}"
            table.add_row(item.row.paper, item.row.setting, *shown, n_delta, item.note)
        show.console(160).print(table)
    return compared


def _calibrate(options: argparse.Namespace) -> Any:
    with importing():
        from fedsim import rules
        from fedsim.privacy import search
        from fedsim.privacy.family import EventFamily

    validate.in_range(options.target_epsilon, *rules.REAL, "--target-epsilon")
    rate, steps, delta = _mechanism(options)
    family = EventFamily.gaussian(rate)
    found = search.noise_multiplier_for(options.target_epsilon, delta, family, steps, options.accountant)
    if options.population is not None:
        units = int(options.population)
        found = dataclasses.replace(
            found, achieved=found.achieved.among(units), verified=found.verified.among(units)
        )
    if not options.json:
        print(f"noise multiplier {found.noise_multiplier:.6g} for q = {rate:.6g}, {steps} steps")
        print(f"reached: {show.spent(dataclasses.asdict(found.achieved))}")
        print(f"checked: {show.spent(dataclasses.asdict(found.verified))}")
    return found
