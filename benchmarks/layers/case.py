"""What a row of the table is: a model, a batch and a loss, made from a fixed seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Tensor]
Loss = Callable[[Any, Any], Tensor]

SEED = 0
EXAMPLES = 5
CLASSES = 4


def classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits (n, classes) and labels (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def labels(examples: int) -> Tensor:
    """Labels (examples,)."""
    return torch.randint(0, CLASSES, (examples,))


def numbers(*shape: int) -> Callable[[int, int], Tensor]:
    """Return what makes normal inputs (examples, views, *shape), of lengths that differ by example."""

    def make(examples: int, views: int) -> Tensor:
        scale = torch.linspace(0.5, 2.0, examples).reshape(-1, *[1] * (len(shape) + 1))
        return torch.randn(examples, views, *shape) * scale

    return make


def ids(length: int, vocabulary: int, start: int = 0) -> Callable[[int, int], Tensor]:
    """Return what makes ids (examples, views, length) from `start` to `vocabulary` - 1."""
    return lambda examples, views: torch.randint(start, vocabulary, (examples, views, length))


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        group: heading it stands under.
        name: unique.
        model: makes the model, the same from the same seed of torch.
        inputs: (examples, views) -> inputs, each array (examples, views, ...).
        targets: examples -> targets, each array (examples, ...).
        loss: (outputs, targets) -> one loss a view.
        zero: shell patterns of parameters that start at zero: last layers and gates. Each matches some.
        examples, views: of the batch.
        rate: learning rate of the plain SGD updates.
        whole: the model takes a mapping as one argument, not its arrays by keyword.
        refused: no gradient of one example is defined, so the right answer is an InputError.
    """

    group: str
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], Batch]
    targets: Callable[[int], Batch] = labels
    loss: Loss = field(default=classes)
    zero: tuple[str, ...] = ("head.*",)
    examples: int = EXAMPLES
    views: int = 2
    rate: float = 0.1
    whole: bool = False
    refused: bool = False

    def build(self) -> nn.Module:
        """Return the model at its start: in train mode, batch and instance norm with statistics frozen."""
        torch.manual_seed(SEED)
        model = self.model().train()
        for module in model.modules():
            frozen = isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
            if frozen and not self.refused:
                module.eval()
        with torch.no_grad():
            for pattern in self.zero:
                found = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
                if not found:
                    raise ValueError(f"{self.name}: no parameter is called {pattern}")
                for parameter in found:
                    parameter.zero_()
        return model

    def batch(self) -> tuple[Batch, Batch]:
        """Return inputs and targets."""
        torch.manual_seed(SEED + 1)
        return self.inputs(self.examples, self.views), self.targets(self.examples)


class Classifier(nn.Module):
    """A body, and a linear head on all it gives of a view, which starts at zero."""

    def __init__(self, body: nn.Module, features: int, smooth: bool = True) -> None:
        super().__init__()
        self.body, self.head, self.smooth = body, nn.Linear(features, CLASSES), smooth

    def forward(self, *arrays: Tensor, **named: Tensor) -> Tensor:
        """Logits of what the body gives, or of the first thing it gives."""
        out = self.body(*arrays, **named)
        while not isinstance(out, Tensor):
            out = out[0]
        return self.head((torch.tanh(out) if self.smooth else out).flatten(1))


class Call(nn.Module):
    """Modules by name, used as a function says: `Call(lambda m, x: m.outer(m.inner(x)), inner=..., ...)`."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, *arrays: Tensor, **named: Tensor) -> Any:
        """What the function gives."""
        return self.function(self, *arrays, **named)


def classified(
    group: str,
    name: str,
    body: Callable[[], nn.Module],
    inputs: Callable[[int, int], Batch],
    **settings: Any,
) -> Case:
    """Return the case of a body behind which a head that starts at zero says the class."""

    def model() -> nn.Module:
        made = body().eval()  # so that no statistics move
        with torch.no_grad():
            example = inputs(1, 1)
            one = {k: v[0] for k, v in example.items()} if isinstance(example, Mapping) else example[0]
            out = made(**one) if isinstance(one, Mapping) else made(one)
        while not isinstance(out, Tensor):
            out = out[0]
        return Classifier(made, math.prod(out.shape[1:]))

    return Case(group, name, model, inputs, **settings)


def with_frozen_statistics(module: nn.Module) -> nn.Module:
    """Return the module with running statistics and affine parameters as after some training."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase):
                if part.running_mean is not None:
                    part.running_mean.normal_()
                    part.running_var.uniform_(0.5, 2.0)
                if part.weight is not None:
                    part.weight.uniform_(0.5, 1.5)
                    part.bias.normal_()
    return module


def architecture(
    group: str,
    name: str,
    model: Callable[[], nn.Module],
    inputs: Callable[[int, int], Batch],
    zero: tuple[str, ...],
    **settings: Any,
) -> Case:
    """Return the case of a whole architecture, one view an example."""

    def made() -> nn.Module:
        return with_frozen_statistics(model())

    return Case(group, name, made, inputs, zero=zero, **{"examples": 4, "views": 1, "rate": 0.05, **settings})


def group_norm(channels: int, **_: Any) -> nn.GroupNorm:
    """A norm in the place of a batch norm."""
    return nn.GroupNorm(2, channels)
