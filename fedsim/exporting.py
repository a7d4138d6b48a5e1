"""A released model as files that other programs read: safetensors and torch.export."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedsim import validate
from fedsim.data.examples import ArrayDataset, normalise
from fedsim.grads import arithmetic
from fedsim.grads.batch import call
from fedsim.run import Run
from fedsim.tasks import Task
from fedsim.validate import InputError

WEIGHTS, PROGRAM, CARD = "model.safetensors", "model.pt2", "model.json"


class Normalised(nn.Module):
    """The model with what comes before and after it: bytes of images (n, H, W, C) are normalised, other
    inputs passed on, and what the task shows beside them, such as the tokens before, comes as a mapping;
    values are in the targets' own unit."""

    def __init__(self, model: nn.Module, blank: ArrayDataset, task: Task) -> None:
        super().__init__()
        self.model = model
        self._blank = blank
        self._task = task
        self._name = ""

    def forward(self, inputs: Tensor, beside: dict[str, Tensor] | None = None) -> Tensor:
        """Return the model's outputs."""
        normalised = normalise(inputs, self._blank, next(self.model.parameters()).dtype)
        given = {self._name: normalised, **beside} if beside else normalised
        return self._task.predicted(call(self.model, given))

    def beside(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return what is shown beside these blank inputs, by name; remembers how the inputs are called."""
        targets = torch.tensor(self._blank.targets).repeat(len(inputs), *[1] * (self._blank.targets.ndim - 1))
        shown = self._task.shown(inputs, targets)
        if isinstance(shown, Tensor):
            return {}
        (self._name,) = (name for name, array in shown.items() if array is inputs)
        return {name: array for name, array in shown.items() if array is not inputs}


def export(run: Run | str | Path, out: str | Path) -> dict[str, Path]:
    """Write a run's model for other programs.

    Args:
        run: a run, or its folder.
        out: folder to write into; made if it is not there.

    Returns:
        The files: "weights", the state dict with model.json as metadata; "program", a torch.export program
        that takes raw inputs of any number (uint8 images (n, H, W, C), features, tokens; for captions also
        {"tokens": those before each place}) and gives logits, or values in the targets' own unit; "card",
        model.json.

    Raises:
        InputError: the folder holds other files of these names, or torch.export cannot follow the model.
    """
    run = run if isinstance(run, Run) else Run(run)
    folder = validate.path(out, "out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out must be a folder, got the file {folder}. Choose another name.")
    places = {"weights": folder / WEIGHTS, "program": folder / PROGRAM, "card": folder / CARD}
    if taken := [path for path in places.values() if path.exists()]:
        raise InputError(
            f"{folder} must not hold a model already, got {taken[0].name}. Choose another folder."
        )
    card = run.card.to_json()
    program = _program(run)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone().contiguous() for name, tensor in run.model.state_dict().items()}
    metadata = {"format": "pt", "fedsim": json.dumps(json.loads(card))}
    places["weights"].write_bytes(save(state, metadata))  # the library's own writing lets nobody else read it
    torch.export.save(program, places["program"])
    places["card"].write_text(card, encoding="utf-8")
    return places


def _program(run: Run) -> Any:
    blank = run.card.blank()
    inputs = torch.tensor(blank.inputs).repeat(2, *[1] * (blank.inputs.ndim - 1))
    wrapped = Normalised(run.model, blank, run.task).eval()
    beside = wrapped.beside(inputs)
    given = (inputs, beside) if beside else (inputs,)
    try:
        # On the CPU nothing is rounded to TF32, and torch's export asks for cuDNN's switches in the old way,
        # which raises unless they stand where a process starts.
        with warnings.catch_warnings(), arithmetic.products("tf32"):
            warnings.simplefilter("ignore")
            first = {0: torch.export.Dim("n", min=1)}
            any_number = {"inputs": first, **({"beside": dict.fromkeys(beside, first)} if beside else {})}
            program = torch.export.export(wrapped, given, dynamic_shapes=any_number)
        found = program.module()(*given)
    except Exception as error:
        raise InputError(
            f"torch.export cannot follow this model: {type(error).__name__}: {str(error)[:500]}. The weights "
            f"are in {run.folder / 'final.safetensors'}."
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names this machine's folders to whoever gets the file
    if not torch.allclose(found, wrapped(*given), rtol=1e-4, atol=1e-5):
        raise InputError("torch.export's program must give the model's outputs, and gives others.")
    return program
