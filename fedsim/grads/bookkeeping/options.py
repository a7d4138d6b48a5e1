"""Settings of the engine; none changes a result beyond float rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fedsim import validate
from fedsim.grads.arithmetic import products
from fedsim.validate import InputError

PRECISIONS = ("float32", "tf32", "bfloat16")
_SCRATCH_CPU = 2**24
_SCRATCH_CUDA = 2**28
_BUDGET_CPU = 2**31


@dataclass(frozen=True)
class Options:
    """How the bookkeeping engine works.

    There is no switch for `torch.compile`: the engine sees a model through a torch function mode that tells
    tensors apart by identity, which the compiler can neither trace nor keep valid from call to call, so it
    breaks the graph at every operation and compiles the mode's own code again and again.

    Attributes:
        memory_budget: bytes that per-example gradients kept until the end of a call may take beyond what
            holding output gradients instead takes. 0 is the low-memory mode. None: 2 GiB on the CPU, an
            eighth of the memory of a CUDA device.
        scratch: bytes of one temporary; larger work is cut over examples. None: 16 MiB on the CPU (about
            what a cache holds), 256 MiB on a CUDA device.
        channels_last: run images in channels-last layout; None: where it was measured to help, that is on
            the CPU for convolutional models without group norms (which want the other layout), and it is
            what CUDA wants in bfloat16.
        precision: "float32"; "tf32" and "bfloat16" (autocast) are for CUDA, and make forward and backward
            faster and less exact. What the engine itself multiplies, for norms and sums, is in float32 in
            all of them, so that no contribution is longer than measured.
        fill: examples that a call is filled up to, with copies of its first that count nothing. Kernels
            differ with the size of a batch, and with them the digits of all in it: so that it does not
            matter to the others who is missing. `clipped_gradient_sum` sets it.
        cuda_graphs: record what a full physical batch launches, and replay it: see `bookkeeping.graphs`. On
            CUDA, for models whose code does the same in every call.
        sharers: processes that compute on one CUDA device at the same time, which have its memory together.
    """

    memory_budget: int | None = None
    scratch: int | None = None
    channels_last: bool | None = None
    precision: str = "float32"
    sharers: int = 1
    fill: int = 1
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        validate.one_of(self.precision, PRECISIONS, "engine.precision")
        if self.memory_budget is not None and self.memory_budget < 0:
            raise InputError(
                f"memory_budget must be None or at least 0 bytes, got {self.memory_budget}. "
                "Use 0 for the low-memory mode."
            )
        if self.scratch is not None:
            validate.positive(self.scratch, "scratch")

    @property
    def margin(self) -> float:
        """Factor on every contribution, as an allowance for kernels of GPUs that are not known.

        Where an example leaves a physical batch, the others move up. Should a kernel add in another order for
        another row, a last digit of float32 may fall on the other side, and TF32 and bfloat16 keep 10 and 7
        bits after the first: a factor changes by up to 2 ** -10 and 2 ** -7. What follows from it is not
        bounded: it is no proof.
        """
        return {"float32": 1.0, "tf32": 1.0 / (1.0 + 2.0**-9), "bfloat16": 1.0 / (1.0 + 2.0**-6)}[
            self.precision
        ]

    def budget_on(self, device: torch.device) -> int:
        """Bytes for kept per-example gradients on `device`; the same in every run on the same hardware."""
        if self.memory_budget is not None:
            return self.memory_budget
        if device.type == "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory) // 8 // self.sharers
        return _BUDGET_CPU

    def scratch_on(self, device: torch.device) -> int:
        """Bytes of one temporary on `device`."""
        if self.scratch is not None:
            return self.scratch
        return max(_SCRATCH_CPU, _SCRATCH_CUDA // self.sharers) if device.type == "cuda" else _SCRATCH_CPU

    def wants_channels_last(self, model: nn.Module, images: torch.Tensor) -> bool:
        """Whether `images` (n, channels, height, width) shall be laid out channels-last for `model`."""
        if self.channels_last is not None:
            return self.channels_last
        if images.is_cuda:
            return self.precision == "bfloat16"
        layers = list(model.modules())
        return any(isinstance(layer, nn.Conv2d) for layer in layers) and not any(
            isinstance(layer, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm) for layer in layers
        )

    def check_device(self, device: torch.device) -> None:
        """Raise InputError for a reduced precision, or CUDA graphs, on a device other than CUDA."""
        if self.cuda_graphs and device.type != "cuda":
            raise InputError(
                f"engine.cuda_graphs must be false on {device.type}: graphs are of a CUDA device."
            )
        if self.precision != "float32" and device.type != "cuda":
            raise InputError(
                f"engine.precision must be float32 on {device.type}, got {self.precision!r}. "
                "Reduced precision needs a CUDA device."
            )

    @contextmanager
    def arithmetic(self, device: torch.device) -> Iterator[None]:
        """Enter the chosen precision for forward and backward.

        Raises:
            InputError: a reduced precision on a device other than CUDA.
        """
        self.check_device(device)
        with products("ieee" if self.precision == "float32" else "tf32"):
            yield
