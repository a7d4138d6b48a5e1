"""A tripwire for models and losses that mix examples, or draw random numbers.

Per-example gradients are those of an example alone. Of a model that lets examples see one another (statistics
of the batch, a contrastive loss, attention over the batch axis) they are defined and bounded, but they are
not what its author trains; so it is refused where that is seen. The privacy bound never relies on this: every
way computes an example's gradient from that example alone (but Opacus, which takes a batch at once and is
right for models without such effects only). Passing is no proof that examples are kept apart: behind a last
layer that starts at zero, for instance, nothing can be seen yet. So calls 1, 2, 4, 8, ... are looked at.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedsim.grads import arithmetic, batch
from fedsim.grads.batch import Batch
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Loss, check_losses
from fedsim.grads.state import ChangesState, left_as_found
from fedsim.grads.ways import code_of, out_of_memory
from fedsim.validate import InputError

EXAMPLES = 3


@dataclass(frozen=True)
class _Tolerance:
    """How far losses may be apart by rounding."""

    relative: float
    absolute: float

    def within(self, one: Tensor, other: Tensor) -> bool:
        """Whether finite values are as near to each other; those that are not finite say nothing."""
        finite = torch.isfinite(one) & torch.isfinite(other)
        one, other = one[finite], other[finite]
        allowed = self.relative * torch.maximum(one.abs(), other.abs()) + self.absolute
        return bool(((one - other).abs() <= allowed).all())


_EXACT = _Tolerance(1e-6, 1e-9)  # float64
_NEAR = _Tolerance(1e-3, 1e-6)  # other dtypes: what is further apart is looked at in float64
_BLUNT = _Tolerance(1e-2, 1e-3)  # where the model does not run in float64

_calls: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = WeakKeyDictionary()
_lock = threading.Lock()


def check(model: nn.Module, inputs: Batch, targets: Batch, loss: Loss) -> None:
    """Refuse a model or loss that is seen to mix examples or to be random; in calls number 1, 2, 4, 8, ... .

    Compares, without gradients, the losses of the first three examples run together with those run one at a
    time, and those with themselves in a second run. Differences above 1e-3 of the loss (float64: 1e-6) count
    if float64 shows them too. Losses that are not finite say nothing, nor does a model that does not run.

    Args:
        inputs, targets: (B, K, ...) and (B, ...), as of `clipped_gradient_sum`.

    Raises:
        InputError: names what was seen.
    """
    examples, _ = batch.sizes(inputs, targets)
    if not examples or not _due(model, inputs, targets, loss, min(examples, EXAMPLES)):
        return
    few = batch.take(inputs, slice(EXAMPLES)), batch.take(targets, slice(EXAMPLES))
    seen = problem(model, *few, loss)
    if seen:
        raise InputError(seen)


def _due(model: nn.Module, inputs: Batch, targets: Batch, loss: Loss, examples: int) -> bool:
    modes = tuple(module.training for module in model.modules())
    key = (batch.form(inputs), batch.form(targets), code_of(loss), examples, modes)
    with _lock:
        calls = _calls.setdefault(model, {})
        calls[key] = number = calls.get(key, 0) + 1
    return number & (number - 1) == 0


def problem(model: nn.Module, inputs: Batch, targets: Batch, loss: Loss) -> str:
    """Return what is wrong with the model on a few examples, for a message; "" if nothing was seen.

    Args:
        inputs, targets: as of `check`.
    """
    runs = _Runs.of(model, inputs, targets, loss)
    if runs is None:
        return ""
    if next(iter(trainable_parameters(model).values())).dtype == torch.float64:
        return runs.problem(_EXACT)
    if not runs.problem(_NEAR):
        return ""
    wide = None
    with contextlib.suppress(Exception):  # it cannot be copied
        wide = copy.deepcopy(model).double()
    exact = None if wide is None else _Runs.of(wide, inputs, targets, loss)
    return runs.problem(_BLUNT) if exact is None else exact.problem(_EXACT)


@dataclass(frozen=True)
class _Runs:
    """Losses (n, K) of the views of a few examples, float64."""

    name: str
    alone: Tensor
    again: Tensor
    together: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, inputs: Batch, targets: Batch, loss: Loss) -> _Runs | None:
        """Run the examples one at a time, twice, and together; None if one alone does not run."""
        examples, views = batch.sizes(inputs, targets)
        rows = [batch.take(inputs, row) for row in range(examples)]
        repeated = [batch.expanded(batch.take(targets, row), views) for row in range(examples)]
        found = [_losses(model, *pair, loss) for pair in 2 * list(zip(rows, repeated, strict=True))]
        known = [losses for losses in found if losses is not None]
        if len(known) < 2 * examples:
            return None
        alone, again = torch.stack(known).unflatten(0, (2, examples))
        joint = batch.each(lambda array: array.flatten(0, 1), inputs)
        together = _losses(model, joint, batch.repeated(targets, views), loss)
        shaped = None if together is None else together.view(examples, views)
        return cls(type(model).__name__, alone, again, shaped)

    def problem(self, tolerance: _Tolerance) -> str:
        """What the losses say, for a message; "" if nothing."""
        if not tolerance.within(self.alone, self.again):
            return (
                "the forward pass must not be random, nor remember earlier ones, but two runs of "
                f"{self.name} on one example give different losses. Set the rates of dropout and other "
                "random layers to 0 (masks would need randomness keyed by example and step), and let no "
                "counter, average or cache enter the loss."
            )
        if self.together is not None and not tolerance.within(self.alone, self.together):
            return (
                f"model and loss must keep examples apart, but the loss of an example of {self.name} "
                "changes when others are beside it in the batch. Replace what looks along the batch axis: "
                "statistics of the batch (use GroupNorm, or batch norm in eval mode), losses that compare "
                "examples, means or shifts over axis 0."
            )
        return ""


def _losses(model: nn.Module, inputs: Batch, targets: Batch, loss: Loss) -> Tensor | None:
    """Losses (n,) in float64 of inputs (n, ...); None if it does not run."""
    first = next(iter(trainable_parameters(model).values()))
    own = batch.placed(inputs, first.device, first.dtype)
    try:
        with (
            torch.enable_grad(),
            arithmetic.float32(),
            left_as_found(model),
        ):  # a model may behave otherwise without gradients
            losses = loss(batch.call(model, own), batch.placed(targets, first.device))
            check_losses(losses, len(batch.arrays(own)[0]))
    except Exception as problem:
        # What writes into parameters must not reach a transform, whose memory would be left in them.
        if isinstance(problem, ChangesState) or out_of_memory(problem):
            raise
        return None
    return losses.detach().double()
