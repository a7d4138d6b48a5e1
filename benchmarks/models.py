"""The models and batches of the gradient benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import models, seeds
from fedsim.config import ModelConfig

SEED = 0


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        name: of the row.
        family: of `fedsim.models`.
        shape: of one view.
        classes: width of the output.
        examples: physical batch for K = 1 when timing; for K = 16 it is divided by 8.
        gpu_examples: the same on a GPU, which few examples do not fill.
        memory_examples: physical batch for K = 1 when measuring memory.
        options: of the family.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    classes: int
    examples: int
    gpu_examples: int
    memory_examples: int
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """The model, the same in every process, in train mode on the CPU."""
        return models.build(ModelConfig(self.family, dict(self.options)), self.shape, self.classes, SEED)

    def batch(self, examples: int, views: int) -> tuple[Tensor, Tensor]:
        """Inputs (examples, views, *shape) and targets (examples,)."""
        generator = seeds.torch_stream(SEED, "benchmark")
        inputs = torch.randn((examples, views, *self.shape), generator=generator)
        return inputs, torch.randint(0, self.classes, (examples,), generator=generator)


_IMAGE = (3, 32, 32)
CASES = {
    case.name: case
    for case in (
        Case("cnn", "cifar_cnn", _IMAGE, 10, 64, 1024, 128, {}),
        Case("wrn-16-4", "wide_resnet", _IMAGE, 10, 16, 256, 32, {}),
        Case("vit-tiny", "vit", _IMAGE, 10, 16, 256, 32, {}),
        Case("linear-10", "linear", (1280,), 10, 4096, 16384, 4096, {"zero_init": False}),
        Case("linear-100", "linear", (1280,), 100, 4096, 16384, 4096, {"zero_init": False}),
        Case("linear-1000", "linear", (1280,), 1000, 4096, 4096, 4096, {"zero_init": False}),
    )
}
