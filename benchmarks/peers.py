"""The methods of the gradient benchmark: what each does with one batch, set up once.

All compute the sum of per-example gradients clipped to norm 1, of the mean loss over an example's views; the
non-private step computes the plain sum. Opacus' modes are called as its own trainer does, on a model that
stays wrapped; for K > 1 its per-view samples are averaged, which its ghost mode cannot do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.grads import FlatClip, vmap
from fedsim.grads.bookkeeping import Options, clipped_sum
from fedsim.grads.per_example import cross_entropy

CLIP = FlatClip(1.0)
MATERIALISING_LIMIT = 2**30  # bytes of per-example gradients beyond which a method is not tried
Step = Callable[[], object]
Make = Callable[[nn.Module, Tensor, Tensor], Step]


def non_private(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """Forward and backward of the summed loss: 1.0 of every ratio."""
    rows, labels = inputs.flatten(0, 1), targets.repeat_interleave(inputs.shape[1])

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(rows), labels, reduction="sum").backward()

    return step


def non_private_bfloat16(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """The same under autocast, channels-last."""
    rows, labels = inputs.flatten(0, 1), targets.repeat_interleave(inputs.shape[1])
    if rows.dim() == 4:
        rows = rows.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(rows.device.type, torch.bfloat16):
            outputs = model(rows)
        F.cross_entropy(outputs.float(), labels, reduction="sum").backward()

    return step


def ours(options: Options) -> Make:
    """The bookkeeping engine."""

    def make(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
        filled = dataclasses.replace(options, fill=len(inputs))
        return lambda: clipped_sum(model, inputs, targets, cross_entropy, CLIP, filled)

    return make


def by_vmap(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """`torch.func.vmap` over the gradient of one example."""
    return lambda: vmap.clipped_sum(model, inputs, targets, cross_entropy, CLIP)


def opacus(force_functorch: bool) -> Make:
    """Opacus' per-example gradients by hooks, or by functorch for every layer."""

    def make(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
        from opacus import GradSampleModule

        examples, views = inputs.shape[:2]
        wrapped = GradSampleModule(model, loss_reduction="sum", force_functorch=force_functorch)
        rows, labels = inputs.flatten(0, 1), targets.repeat_interleave(views)
        parameters: list[Any] = list(model.parameters())  # Opacus adds `grad_sample`

        def step() -> list[Tensor]:
            wrapped.zero_grad(set_to_none=True)
            for parameter in parameters:
                parameter.grad_sample = None
            F.cross_entropy(wrapped(rows), labels, reduction="sum").backward()
            samples = [p.grad_sample for p in parameters]
            if views > 1:
                samples = [s.unflatten(0, (examples, views)).mean(1) for s in samples]
            norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples], dim=1).norm(dim=1)
            factors = CLIP.coefficients(norms)
            sums = [torch.einsum("i,i...", factors, s) for s in samples]
            for parameter in parameters:
                parameter.grad_sample = None
            return sums

        return step

    return make


def opacus_ghost(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """Opacus' fast gradient clipping: norms in one backward pass, the clipped sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP.clip_norm, loss_reduction="sum", use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=CLIP.clip_norm,
        expected_batch_size=len(inputs),
        loss_reduction="sum",
    )
    criterion = DPLossFastGradientClipping(
        wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum"
    )
    rows = inputs.flatten(0, 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(wrapped(rows), targets).backward()

    return step


def methods(device: str, image: bool) -> dict[str, Make]:
    """All methods for a device, the non-private step first."""
    found: dict[str, Make] = {"non-private": non_private, "ours": ours(Options(channels_last=False))}
    if image:
        found["ours, channels-last"] = ours(Options(channels_last=True))
    found["ours, low memory"] = ours(Options(channels_last=False, memory_budget=0))
    if device == "cuda":
        found["non-private, bfloat16"] = non_private_bfloat16
        found["ours, bfloat16"] = ours(Options(precision="bfloat16"))
        found["ours, bfloat16, graphs"] = ours(Options(precision="bfloat16", cuda_graphs=True))
    found |= {
        "Opacus hooks": opacus(False),
        "Opacus functorch": opacus(True),
        "Opacus ghost": opacus_ghost,
        "vmap": by_vmap,
    }
    return found


def applies(method: str, parameters: int, examples: int, views: int) -> bool:
    """Whether a method can run: Opacus' ghost mode has no views, and some need all gradients in memory."""
    if method == "Opacus ghost":
        return views == 1
    per_view = views if method.startswith("Opacus") else 1
    if method.startswith("Opacus") or method in ("vmap", "jax_privacy"):
        return 4 * parameters * examples * per_view <= MATERIALISING_LIMIT
    return True
