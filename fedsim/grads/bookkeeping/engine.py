"""One call of the engine: forward under watch, one backward pass, norms, coefficients, sums."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedsim.clipping.base import ClipRule
from fedsim.grads import batch
from fedsim.grads import vmap as vmap_engine
from fedsim.grads.arithmetic import float32, off
from fedsim.grads.batch import Batch, arrays, call, each, expanded, sizes, take
from fedsim.grads.bookkeeping import (
    attention,
    conv_rule,
    cross_entropy,
    embedding,
    graphs,
    joint,
    linear,
    norm,
    recurrent,
    standardise,
)
from fedsim.grads.bookkeeping.level import Level
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.options import Options
from fedsim.grads.bookkeeping.precision import squared_norms
from fedsim.grads.bookkeeping.repeat import generic
from fedsim.grads.bookkeeping.tape import Pulled, Rows, Tape, Unsupported, Use
from fedsim.grads.clip import overall, rounded_down
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Loss, check_losses

RULES: dict[Any, Rule] = {
    **linear.RULES,
    **conv_rule.RULES,
    **norm.RULES,
    **embedding.RULES,
    **attention.RULES,
    **recurrent.RULES,
}
SHORTCUTS: dict[Any, Rule] = {**attention.SHORTCUTS, **cross_entropy.SHORTCUTS}
DEFAULT = Options()
TOLERATED = 1e-5
Answer = tuple[Tensor, Tensor, Tensor]


def clipped_sum(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    loss: Loss,
    clip: ClipRule,
    options: Options = DEFAULT,
) -> Answer:
    """Clipped gradient sum of one physical batch; see `microbatch.Engine`.

    One forward pass and one backward pass of output gradients; each layer's exact per-example norms from
    its input and output gradient; one weighted contraction a layer (Bu et al. 2023, "book-keeping", and the
    layer rules named in the modules of this package). The model runs under one level of vmap, so that no
    operation can mix examples.

    Args:
        options: memory, layout, precision; see `Options`.

    Raises:
        InputError: a loss that is not per view, or a precision the device does not have.
        Unsupported: a trainable parameter reaches the loss in a way that cannot be seen.
        Exception: whatever vmap, or the model under it, raises.
    """
    examples, _ = sizes(inputs, targets)
    given = [(array, array._version) for array in (*arrays(inputs), *arrays(targets))]
    filled = max(examples, options.fill)
    device = next(iter(trainable_parameters(model).values())).device
    rows = batch.filled(inputs, filled), batch.filled(targets, filled)
    present = torch.arange(filled, device=device) < examples
    record = options.cuda_graphs and filled == options.fill > 1
    way = functools.partial(graphs.computed, _piece) if record else _piece
    total, norms, losses, finite, alone = way(model, *rows, present, loss, clip, options)
    norms, losses, alone = norms[:examples], losses[:examples], alone[:examples]
    if bool(finite.all() & ~alone.any()):  # the one question a GPU is asked, when all its work is under way
        return total, norms, losses
    if not finite.all():  # 0 * nan is nan: the others go again, alone
        finite = finite[:examples]
        if finite.all():  # but a copy is not
            options = dataclasses.replace(options, fill=1)
        if any(array._version != version for array, version in given):
            raise Unsupported("an example is not finite, and the forward pass has written into the others")
        total = torch.zeros_like(total)
        if finite.any():
            rest = take(inputs, finite), take(targets, finite)
            total, norms[finite], _ = clipped_sum(model, *rest, loss, clip, options)
        # A gradient may be finite where the squares and products of its norm are not in float32.
        odd = take(inputs, ~finite), take(targets, ~finite)
        part, norms[~finite], _ = vmap_engine.clipped_sum(model, *odd, loss, clip)
        total += part * options.margin
    else:
        # Nothing of the others may be in their digits, not even where they lay in memory.
        if any(array._version != version for array, version in given):
            raise Unsupported("a norm is a rounding error, and the forward pass has written into the inputs")
        for example in alone.nonzero()[:, 0].tolist():
            own = slice(example, example + 1)
            only = dataclasses.replace(options, fill=1)
            part, norms[own], _ = clipped_sum(model, take(inputs, own), take(targets, own), loss, clip, only)
            total += part
    return total.detach(), norms, losses


def _piece(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    present: Tensor,
    loss: Loss,
    clip: ClipRule,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything of a call that needs no answer from the device.

    Args:
        present: which examples (B,) count: the others are copies.

    Returns:
        The sum (P,) over those that are present and need not be taken alone; of all examples (B,), copies
        among them, norms, losses, whether they are finite, and whether they must be taken alone.
    """
    named, device = trainable_parameters(model), present.device
    clip_groups = clip.group_of(tuple(named))
    budget, scratch = options.budget_on(device), options.scratch_on(device)
    tape = Tape(model, named, len(present), budget, scratch, clip_groups)
    tape.reduced = options.precision != "float32"
    with tape:
        with options.arithmetic(device):
            groups, losses = _forward_and_backward(model, inputs, targets, loss, options, tape)
        with torch.no_grad(), float32():
            for group in groups:
                group.add_squares(tape)
            small = [_Small(tape, group) for group in range(len(tape.total))]
            for kept in small:
                kept.add_squares()
            norms = _norms(tape)
            finite = torch.isfinite(overall(norms))
            coefficients = clip.coefficients(norms)
            alone = _too_short(tape, clip, coefficients)
            if len(present) == 1 and alone.any():  # nobody's digits to keep it out of
                total = _formed(tape, clip, norms, coefficients)
                alone = torch.zeros_like(alone)
            else:  # copies have gradients like any other, and count nothing
                coefficients = coefficients * _like(present & ~alone, coefficients)
                factors = rounded_down(coefficients, tape.anchor.dtype)
                total = _weighted(tape, small, groups, factors)
            if options.margin < 1.0:
                total *= options.margin
    return total.detach(), norms, losses, finite, alone


def _like(chosen: Tensor, coefficients: Tensor) -> Tensor:
    """`chosen` (B,) in the axes of `coefficients`, (B,) or (B, G)."""
    return chosen if coefficients.dim() == 1 else chosen[:, None]


def _one_or_all(tape: Tape, by_group: list[Tensor]) -> Tensor:
    """Return (B,) of whole gradients, or (B, G) of clip groups."""
    return by_group[0] if len(by_group) == 1 and not tape.grouped else torch.stack(by_group, dim=1)


def _norms(tape: Tape) -> Tensor:
    """Norms (B,), or (B, G) of clip groups, rounded up."""
    if not tape.doubted:
        return _one_or_all(tape, [total.sqrt() for total in tape.total])
    pairs = zip(tape.total, tape.doubt, strict=True)
    return _one_or_all(tape, [(total + doubt).sqrt_() for total, doubt in pairs])


def _too_short(tape: Tape, clip: ClipRule, coefficients: Tensor) -> Tensor:
    """Which examples (B,) would be scaled down by more than `TOLERATED` because norms are rounded up."""
    if not tape.doubted:
        return torch.zeros_like(tape.total[0], dtype=torch.bool)
    least = clip.coefficients(_one_or_all(tape, [total.sqrt() for total in tape.total]))
    short = least - coefficients > TOLERATED * least
    return short if short.dim() == 1 else short.any(1)


def _formed(tape: Tape, clip: ClipRule, norms: Tensor, coefficients: Tensor) -> Tensor:
    """Clipped gradient (P,) of the one example there is, formed; corrects its `norms` and `coefficients`."""
    parameters = list(tape.parameters.values())
    sizes = [parameter.numel() for parameter in parameters]
    gradient = tape.anchor.detach().new_zeros(sum(sizes))
    segments = dict(zip(tape.parameters, gradient.split(sizes), strict=True))
    for use in tape.uses:
        if use.filled:
            for parameter, part in use.pull_back(use.rows(0, 1), use.leaves):
                segments[id(parameter)] += part.flatten()
    squares = [torch.zeros_like(total) for total in tape.total]
    for key, segment in segments.items():
        squares[tape.clip_groups[key]] += squared_norms(segment[None])
    norms.copy_(_one_or_all(tape, [square.sqrt() for square in squares]))
    coefficients.copy_(clip.coefficients(norms))
    factors = rounded_down(coefficients, gradient.dtype).reshape(-1).tolist()
    for key, segment in segments.items():
        segment *= factors[tape.clip_groups[key]]
    return gradient


def _forward_and_backward(
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    loss: Loss,
    options: Options,
    tape: Tape,
) -> tuple[list[joint.Group], Tensor]:
    """Record the call on `tape` and fill every use; returns the losses (B,) too."""
    _, views = sizes(inputs, targets)
    # No cast of a weight is kept: autocasts around this one would hand it on to calls with other values.
    bfloat16, device = options.precision == "bfloat16", tape.anchor.device.type

    def example_loss(own: Batch, target: Batch) -> Tensor:
        watch = Watch(tape, Level(), RULES, generic, standardise.DERIVATIONS, SHORTCUTS)
        with watch:
            with torch.autocast(device, torch.bfloat16, cache_enabled=False) if bfloat16 else nullcontext():
                outputs = call(model, own)
            if bfloat16 and isinstance(outputs, Tensor):
                outputs = outputs.float()
            losses = loss(outputs, expanded(target, views))
        check_losses(losses, views)
        return losses

    rows = each(lambda array: _laid_out(array.detach(), model, options), inputs)
    with torch.enable_grad():
        losses = vmap(example_loss, randomness="error")(rows, targets)
        hidden = tape.parameters_of(losses)
        if hidden:
            names = ", ".join(tape.names[id(p)] for p in hidden)
            raise Unsupported(f"{names} reach the loss in a way that cannot be seen")
        groups = joint.groups(tape)
        if losses.requires_grad:
            with off(losses.device.type):  # the model may have left one on
                torch.autograd.backward(losses, torch.full_like(losses, 1.0 / views))
                with torch.no_grad():
                    for fill in tape.after_backward:
                        fill()
    return groups, losses.detach().mean(1)


def _laid_out(array: Tensor, model: nn.Module, options: Options) -> Tensor:
    """Images (B, K, channels, height, width) in the layout that suits the model, other arrays as they are."""
    if array.dim() != 5 or not array.is_floating_point():
        return array
    images = array.flatten(0, 1)
    if options.wants_channels_last(model, images):
        images = images.contiguous(memory_format=torch.channels_last)
    return images.unflatten(0, array.shape[:2])


class _Small:
    """All uses in a clip group with kept small gradients as one matrix (B, entries): one norm and one product
    for all."""

    def __init__(self, tape: Tape, group: int) -> None:
        self.uses = [
            use
            for use in tape.uses
            if isinstance(use, Rows) and use.alone and use.filled and use.clip_groups[0] == group
        ]
        self._joined = torch.cat([use.gradients for use in self.uses], dim=1) if self.uses else None
        self._total = tape.total[group]

    def add_squares(self) -> None:
        """Add the squared norms over all of them to the tape's total."""
        if self._joined is not None:
            self._total.add_(squared_norms(self._joined))

    def weighted(self, coefficients: Tensor) -> list[tuple[Use, Tensor]]:
        """Each use with the weighted sum of its gradients, (entries,)."""
        if self._joined is None:
            return []
        total = coefficients.to(self._joined.dtype) @ self._joined
        parts = total.split([use.weight.numel() for use in self.uses])
        return list(zip(self.uses, parts, strict=True))


def _weighted(tape: Tape, small: list[_Small], groups: list[joint.Group], coefficients: Tensor) -> Tensor:
    """Sum of coefficient * gradient over examples as a flat vector, pulled back to the parameters.

    Args:
        small: by clip group.
        groups: of uses that are measured together.
        coefficients: (B,), or (B, G) for each clip group.
    """
    factors = [coefficients] if coefficients.dim() == 1 else coefficients.t().contiguous().unbind()
    total = _Total(tape)
    together = {id(use) for kept in small for use in kept.uses}
    for kept, own_factors in zip(small, factors, strict=True):
        for use, part in kept.weighted(own_factors):
            if isinstance(use.weight, nn.Parameter):
                total.add([(use.weight, part)])
            else:
                total.add(use.pull_back(part.view(use.weight.shape), use.leaves))
    rest = [use for use in tape.uses if use.filled and use.alone and id(use) not in together]
    tape.uses.clear()
    for group in groups:
        total.add(group.weighted(tape, factors))
    while rest:
        use = rest.pop()  # its tensors can go as soon as they are summed
        sums = use.weighted(factors[use.clip_groups[0]], total.place(use.weight))
        total.add(use.pull_back(sums, use.leaves, total.place))
    return total.finished()


class _Total:
    """The flat sum over all parameters, each part of which the first that comes may be put into directly."""

    def __init__(self, tape: Tape) -> None:
        leaves = tape.parameters.values()
        self._flat = tape.anchor.detach().new_empty(sum(p.numel() for p in leaves))
        parts = self._flat.split([p.numel() for p in leaves])
        self._free = dict(zip(tape.parameters, parts, strict=True))
        self._written: dict[int, Tensor] = {}

    def place(self, parameter: Tensor) -> Tensor | None:
        """Where the first gradient of `parameter` may be put; None for the others, and for other tensors."""
        place = self._free.get(id(parameter))
        return None if place is None else place.view(parameter.shape)

    def add(self, gradients: Pulled) -> None:
        """Add gradients of parameters, in any shape; some of them may be in their places already."""
        for parameter, part in gradients:
            key = id(parameter)
            if key in self._written:
                self._written[key].add_(part.flatten())
                continue
            place = self._written[key] = self._free.pop(key)
            if part.data_ptr() != place.data_ptr():
                place.copy_(part.flatten())

    def finished(self) -> Tensor:
        """The sum (P,); what nothing was added to is zero."""
        for place in self._free.values():
            place.zero_()
        return self._flat
