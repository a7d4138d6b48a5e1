"""`check`: the dry run of a recipe."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from fedsim.cli import show
from fedsim.cli.arguments import command, config_arguments, importing, load


def add(commands: Any) -> None:
    """Register the command."""
    check = command(
        commands,
        "check",
        _check,
        "dry run: plan, noise, epsilon beside the published one, operations, hours, memory and bytes",
        "Trains nothing and needs no GPU; large data sets need not be there.",
    )
    config_arguments(check)
    check.add_argument(
        "--flops-per-second",
        type=float,
        metavar="RATE",
        help="what one machine sustains, for its hours (default 5e13, a third of an A100's TF32 peak)",
    )
    check.add_argument("--all", action="store_true", help="show the whole configuration and every number")


def _check(options: argparse.Namespace) -> dict[str, Any]:
    with importing():
        from fedsim.study import plan as planning

    config = load(options)
    rate = planning.FLOPS_PER_SECOND if options.flops_per_second is None else options.flops_per_second
    plan = planning.describe(config, rate)
    if not options.json:
        from fedsim import loading

        console = show.console()
        if options.all:
            console.print(loading.to_yaml(config), highlight=False)
        table = show.table(config.title or "plan", "")
        for name, value in _rows(plan) if options.all else _leading(plan):
            table.add_row(name, value)
        console.print(table)
        if options.all and plan["sensitive"]:
            print("What is marked sensitive follows from private examples, and is not to be published.")
        if not options.all:
            print("Every number and the whole configuration: --all")
    return {"config": dataclasses.asdict(config), "plan": plan}


def _leading(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run is judged by before it starts: its epsilons, its noise, its steps, and what it costs; beside
    them what the paper says, and what is unusual."""
    spent = {kind: value for kind, value in plan["epsilon"].items() if not kind.endswith(("_check", "_rdp"))}
    rows = show.epsilons(spent, plan["sensitive"])
    sigma, spread = plan["noise_multiplier"], plan["noise_std_of_mean"]
    if sigma is not None:
        noise = f"{show.number(sigma)} times the bound on one {plan['unit']}'s contribution"
        noise += "" if spread is None else f"; {show.number(spread)} on every entry of the mean"
        rows.append(("noise", noise))
    steps = (
        f"{plan['steps']:,} of about {plan['expected_batch_size']:,.0f} examples of {plan['examples']:,} "
        f"({plan['epochs']:.3g} epochs)"
    )
    rows.append(("steps", steps + (", stopped by the budget" if plan["stopped_by_budget"] else "")))
    memory = plan["memory_bytes_without_data_and_libraries"]["node"]
    rows.append(
        (
            "cost",
            f"{plan['flops']['run']:.3g} operations, {plan['gpu_hours']:.3g} hours at "
            f"{plan['flops_per_second']:.0e} a second; {memory / 1e6:,.3g} MB a node beside data and "
            f"libraries; {plan['bytes_from_largest_node_per_step']:,} bytes from the largest node a step",
        )
    )
    rows += _published(plan["published"]) if plan["published"] is not None else []
    unusual = ("own_code", "undecodable")
    chosen = {name: plan[name] for name in unusual if plan[name]} | {"sensitive": plan["sensitive"]}
    return rows + _rows(chosen)


def _rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The plan as lines; what the paper says stands under what is accounted here."""
    rows: list[tuple[str, str]] = []
    for name, value in plan.items():
        label = name.replace("_", " ") + (" (sensitive)" if name in plan["sensitive"] else "")
        if name == "epsilon":
            rows += show.epsilons(value, plan["sensitive"])
        elif name == "published":
            rows += _published(value) if value is not None else []
        elif name == "sensitive":
            continue  # said at each
        elif isinstance(value, list):
            rows.append((label, "\n".join(value) or "-"))
        elif isinstance(value, dict):  # the number of holders itself is assumed public
            heads = {key: name.replace("_", " ") if key == name else label for key in value}
            rows += [(f"{heads[key]}: {key}", show.number(inner)) for key, inner in value.items()]
        else:
            rows.append((label, show.number(value)))
    return rows


def _published(published: dict[str, Any]) -> list[tuple[str, str]]:
    where = ", ".join(str(published[key]) for key in ("paper", "table", "row") if key in published)
    status = published.get("status", "status unknown")
    off = ", ".join(f"{name} {share:+.2%}" for name, share in published["difference"].items())
    verdict = "agrees" if published["agrees"] else "does not agree"
    rows = [
        ("published in", where),
        (
            "published epsilon",
            f"{published['epsilon']:.4g} at delta {published.get('delta', '?')} by "
            f"{published.get('accountant', 'an unknown accountant')} ({status})",
        ),
        ("accounted here", f"{off}; {verdict} within {published['tolerance']:.0%}"),
    ]
    if "accuracy" in published:
        read = published.get("accuracy_status", status)
        rows.append(("published accuracy", f"{published['accuracy']}% ({read})"))
    if "note" in published:
        rows.append(("note", str(published["note"])))
    return rows
