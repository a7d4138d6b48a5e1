"""`predict` and `export`: what becomes of a run's model; `list`: what can be chosen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.cli import show
from fedsim.cli.arguments import command
from fedsim.validate import InputError

if TYPE_CHECKING:
    from fedsim.engine.model_card import Card


def add(commands: Any) -> None:
    """Register the commands."""
    predict = command(
        commands,
        "predict",
        _predict,
        "what a run's model says of examples",
        "Needs the run's folder alone, neither its data nor its configuration.",
    )
    predict.add_argument("run", type=Path, metavar="RUN")
    predict.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="a .npy array of examples; an image, or a folder of images; a table, or texts",
    )
    predict.add_argument("--out", type=Path, metavar="FILE", help="also write all outputs here, as .npy")
    export = command(
        commands, "export", _export, "a run's model for other programs: safetensors, torch.export, model.json"
    )
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True, help="folder to write into")
    listed = command(commands, "list", _list, "what a configuration can choose, with options and defaults")
    listed.add_argument("axis", nargs="?", metavar="SETTING", help="such as data.name; default: all")


def _predict(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from fedsim.run import Run, predict

    run = Run(options.run)
    names, inputs = _inputs(options.input, run.card)
    found = predict(run, inputs)
    if options.out is not None:
        np.save(options.out, found.outputs)
    said = [
        _words(best, outputs, found.names) for best, outputs in zip(found.best, found.outputs, strict=True)
    ]
    if not options.json:
        for name, words in zip(names, said, strict=True):
            print(f"{name}\t{words}")
    return {"inputs": names, "predictions": found.best.tolist(), "outputs": found.outputs.tolist()}


def _words(best: Any, outputs: Any, names: tuple[str, ...]) -> str:
    """One prediction as a line: the class and its probability, the labels that are present, the values, the
    caption."""
    from fedsim.data.byte_pairs import words as caption

    if best.ndim == 0:
        index = int(best)
        return f"{names[index] if names else index}\t{float(outputs[index]):.4f}"
    if best.dtype.kind == "f":
        return " ".join(f"{float(value):.6g}" for value in best)
    if best.dtype.kind == "u":
        return " ".join(names[i] if names else str(i) for i in best.nonzero()[0]) or "-"
    if names:
        return caption(best.tolist(), names)
    return " ".join(map(str, best.tolist()))


def _inputs(path: Path, card: Card) -> tuple[list[str], Any]:
    """Return names and examples of a file or folder, read as the run read its data, images in their shape."""
    import numpy as np

    if not path.exists():
        raise InputError(f"INPUT must be a file or folder, and {path} is not there.")
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} must be a .npy array of examples: {error}") from error
        return [str(row) for row in range(len(array))], array
    if not card.mean:
        from fedsim.data.sources import SOURCES

        if card.source is None:
            raise InputError(f"INPUT must be a .npy array for a model of these data, got {path}.")
        return SOURCES.make(card.source).inputs(path)
    from fedsim import validate
    from fedsim.data.sources import folders
    from fedsim.data.sources.image_files import pixels

    files = folders.files(path, "INPUT") if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} must hold images, and is empty.")
    options = {} if card.source is None else card.source.options
    fit, short = str(options.get("fit", "crop")), options.get("short_side")
    found: dict[str, Any] = {}
    for file in files:
        name = validate.printable(file.relative_to(path).as_posix() if path.is_dir() else file.name)
        try:
            found[name] = pixels(file, card.example_shape, fit, short)
        except InputError as error:
            if not path.is_dir():
                raise
            print(f"fedsim: left out: {error}", file=sys.stderr)
    if not found:
        raise InputError(f"{path} must hold images, and none of its {len(files)} files is one.")
    return list(found), np.stack(list(found.values()))


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
        from rich.console import Console

        for setting, variants in found.items():
            table = show.table(setting, "", "options")
            for name, (about, given) in variants.items():
                table.add_row(name, about, ", ".join(f"{key}={value}" for key, value in given.items()))
            for name, reference in axes.offered()[setting].items():
                table.add_row(name, f"{reference}, of an installed package", "its arguments")
            table.add_row("package.module:Object", "an object of your own", "its arguments")
            Console(width=max(120, Console().width)).print(table)
    return found
