"""`predict` and `export`: what becomes of a run's model; `examples`: files to try it on; `list`: what can be
chosen."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.cli import show
from fedsim.cli.arguments import command, config_arguments, importing, load

if TYPE_CHECKING:
    from fedsim.run import Predictions


def add(commands: Any) -> None:
    """Register the commands."""
    predict = command(
        commands,
        "predict",
        _predict,
        "what a run's model says of examples",
        "Needs the run's folder alone, neither its data nor its configuration. Prints CSV whose first line "
        "names its columns: the input, and its class and probability, labels, values or caption.",
    )
    predict.add_argument("run", type=Path, metavar="RUN")
    predict.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="a .npy array of examples; an image, or a folder of images; a table, or texts",
    )
    predict.add_argument("--out", type=Path, metavar="FILE", help="also write all outputs here, as .npy")
    examples = command(
        commands,
        "examples",
        _examples,
        "a few test examples of a configuration's data as files, to try predict on",
        "Images become PNG files named by row and class, anything else one .npy array.",
    )
    config_arguments(examples)
    examples.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new folder for the files"
    )
    examples.add_argument("--count", type=int, default=10, metavar="N", help="how many (default 10)")
    export = command(
        commands, "export", _export, "a run's model for other programs: safetensors, torch.export, model.json"
    )
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True, help="folder to write into")
    listed = command(commands, "list", _list, "what a configuration can choose, with options and defaults")
    listed.add_argument("axis", nargs="?", metavar="SETTING", help="such as data.name; default: all")


def _predict(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from fedsim.run import Run

    run = Run(options.run)
    found = run.predict(options.input)
    if options.out is not None:
        np.save(options.out, found.outputs)
    if not options.json:
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(["input", *_columns(found, run.card.targets.kind)])
        for name, best, outputs in zip(found.examples, found.best, found.outputs, strict=True):
            table.writerow([name, *_cells(best, outputs, found.names)])
    return {
        "inputs": list(found.examples),
        "predictions": found.best.tolist(),
        "outputs": found.outputs.tolist(),
    }


def _columns(found: Predictions, kind: str) -> list[str]:
    """What `_cells` has: the class and its probability, the labels that are present, each value, the caption
    or tokens."""
    if kind == "class":
        return ["class", "probability"]
    if kind == "values":
        several = found.best.shape[1] > 1
        return list(found.names) or [f"value {n}" if several else "value" for n in range(found.best.shape[1])]
    if kind == "labels":
        return ["labels"]
    return ["caption" if found.names else "tokens"]


def _cells(best: Any, outputs: Any, names: tuple[str, ...]) -> list[str]:
    """What is said of one example."""
    from fedsim.data.byte_pairs import words as caption

    if best.ndim == 0:
        index = int(best)
        return [str(names[index] if names else index), f"{float(outputs[index]):.4f}"]
    if best.dtype.kind == "f":
        return [f"{float(value):.6g}" for value in best]
    if best.dtype.kind == "u":
        return [" ".join(names[i] if names else str(i) for i in best.nonzero()[0])]
    return [caption(best.tolist(), names) if names else " ".join(map(str, best.tolist()))]


def _examples(options: argparse.Namespace) -> dict[str, list[str]]:
    with importing():
        from fedsim import validate
        from fedsim.data import as_files, datasets

    validate.positive(options.count, "--count")
    # As they are before feature maps; of the test split, whatever a run of the configuration is judged by.
    data = dataclasses.replace(load(options).data, features=None, holdout_examples=0)
    files = [str(path) for path in as_files.write(datasets.load(data).test, options.out, options.count)]
    if not options.json:
        print("\n".join(files))
    return {"files": files}


def _export(options: argparse.Namespace) -> dict[str, str]:
    from fedsim.exporting import export

    made = {name: str(path) for name, path in export(options.run, options.out).items()}
    if not options.json:
        for name, path in made.items():
            print(f"{name}: {path}")
    return made


def _list(options: argparse.Namespace) -> dict[str, Any]:
    from fedsim import axes, validate

    if options.axis is not None:
        validate.one_of(options.axis, axes.described(), "SETTING")
    found = {
        setting: variants for setting, variants in axes.described().items() if options.axis in (None, setting)
    }
    if not options.json:
        for setting, variants in found.items():
            table = show.table(setting, "", "options")
            for name, (about, given) in variants.items():
                table.add_row(name, about, ", ".join(f"{key}={value}" for key, value in given.items()))
            for name, reference in axes.offered()[setting].items():
                table.add_row(name, f"{reference}, of an installed package", "its arguments")
            table.add_row("package.module:Object", "an object of your own", "its arguments")
            show.console(120).print(table)
    return found
