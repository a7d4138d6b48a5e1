"""The engine's check of itself: does what it says of a model agree with one example at a time?

The tape assumes that the first axis holds the examples wherever a weight is used. A model that transposes
its batch, or mixes examples, breaks that without an error. So the first call of a model and input shape is
checked on a few examples against plain autograd, which assumes nothing.

The check runs on a copy of the model in float64, where the two must agree to many digits. In float32 a
rounding difference can put one ReLU on the other side of zero and move an example's gradient by a percent,
and TF32 and bfloat16 move it by more: no tolerance would then separate rounding from a wrong structure, and
the verdict could differ between a run and its continuation.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedsim.grads.clip import ClipRule
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Loss, check_losses

EXAMPLES, VIEWS = 3, 2
Answer = tuple[Tensor, Tensor, Tensor]
Run = Callable[[nn.Module, Tensor, Tensor, ClipRule], Answer]
Key = tuple[object, ...]

_TOLERANCE = {torch.float64: 1e-6}
_LOOSE = 0.05  # where the model does not run in float64
_verdicts: WeakKeyDictionary[nn.Module, dict[Key, bool]] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class _Uneven(ClipRule):
    """A different weight for each example, so that their sum tells them apart."""

    @property
    def sensitivity(self) -> float:
        """Nothing is released: not used."""
        return float("inf")

    def coefficients(self, norms: Tensor) -> Tensor:
        """1, 1/2, 1/3, ..."""
        return 1.0 / torch.arange(1, len(norms) + 1, dtype=norms.dtype, device=norms.device)


def agrees(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, run: Run) -> bool:
    """Whether `run(model, inputs, targets, clip)` can be trusted; computed once, then remembered.

    Args:
        model: in train mode; left as it is.
        inputs, targets, loss: as of the engine; up to `EXAMPLES` examples and `VIEWS` views of each are used.
        run: the engine itself, in full precision.
    """
    inputs, targets = inputs[:EXAMPLES, :VIEWS], targets[:EXAMPLES]
    names = tuple(trainable_parameters(model))
    key = (inputs.shape, inputs.dtype, inputs.device, names)
    with _lock:
        known = _verdicts.setdefault(model, {}).get(key)
    if known is not None:
        return known
    try:
        exact = copy.deepcopy(model).double()
        verdict = _compare(exact, _wide(inputs), _wide(targets), loss, run)
    except (RuntimeError, TypeError):  # it cannot be copied, or insists on its own precision
        verdict = _compare(model, inputs, targets, loss, run)
    if verdict is None:
        return True  # nothing to compare; the next call is checked
    with _lock:
        _verdicts[model][key] = verdict
    return verdict


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _compare(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, run: Run) -> bool | None:
    """Compare norms and a weighted sum over the examples of finite gradient; None if all of those are 0."""
    leaves = list(trainable_parameters(model).values())
    total = torch.zeros(sum(p.numel() for p in leaves), dtype=leaves[0].dtype, device=leaves[0].device)
    norms: list[float] = []
    finite: list[int] = []
    for index, (views, target) in enumerate(zip(inputs, targets, strict=True)):
        gradient = _gradient(model, views, target, loss, leaves)
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        if norm < float("inf"):  # not so for nan either
            finite.append(index)
            norms.append(norm)
            total += gradient / len(finite)
    if not any(norms):
        return None
    expected = torch.tensor(norms, dtype=torch.float64, device=total.device)
    found_total, found_norms, _ = run(model, inputs[finite], targets[finite], _Uneven())
    tolerance = _TOLERANCE.get(total.dtype, _LOOSE) * max(norms)
    apart = torch.linalg.vector_norm(found_total - total), (found_norms - expected).abs().max()
    return all(float(distance) <= tolerance for distance in apart)


def _gradient(
    model: nn.Module, views: Tensor, target: Tensor, loss: Loss, leaves: list[nn.Parameter]
) -> Tensor:
    """Gradient (P,) of one example's loss, by plain autograd."""
    with torch.enable_grad():
        losses = loss(model(views), target.expand(views.shape[0], *target.shape))
        check_losses(losses, views.shape[0])
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if losses.requires_grad:
            found = torch.autograd.grad(losses.mean(), leaves, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])
