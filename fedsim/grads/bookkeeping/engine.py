"""One call of the engine: forward under watch, one backward pass, norms, coefficients, sums."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.grads import vmap
from fedsim.grads.bookkeeping import attention, conv_rule, elementwise, embedding, joint, linear, norm
from fedsim.grads.bookkeeping.fallback import generic, tell_once
from fedsim.grads.bookkeeping.leaves import parameters_of
from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.options import Options
from fedsim.grads.bookkeeping.tape import Rows, Tape, Unsupported, Use, squared_norms
from fedsim.grads.bookkeeping.verify import agrees
from fedsim.grads.clip import ClipRule, overall
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Loss, check_losses

RULES: dict[Any, Rule] = {
    **elementwise.RULES,
    **linear.RULES,
    **conv_rule.RULES,
    **norm.RULES,
    **embedding.RULES,
    **attention.RULES,
}
DEFAULT = Options()
Answer = tuple[Tensor, Tensor, Tensor]


def clipped_sum(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    clip: ClipRule,
    options: Options = DEFAULT,
) -> Answer:
    """Clipped gradient sum of one physical batch; see `microbatch.Engine`.

    One forward pass and one backward pass of output gradients; each layer's exact per-example norms from
    its input and output gradient; one weighted contraction a layer (Bu et al. 2023, "book-keeping", and the
    layer rules named in the modules of this package). A model the engine cannot follow, or whose result
    does not agree with plain autograd (`Options.verify`), is left to the vmap engine, with one log line.

    Args:
        options: memory, layout, precision, self-check; see `Options`.

    Raises:
        InputError: a loss that is not per view, or a precision the device does not have.
    """

    exact = replace(options, precision="float32")

    def run(copied: nn.Module, few: Tensor, their_targets: Tensor, rule: ClipRule) -> Answer:
        return taped(copied, few, their_targets, loss, rule, exact)

    try:
        if not options.verify or agrees(model, inputs, targets, loss, run):
            return taped(model, inputs, targets, loss, clip, options)
        reason = "its gradients disagree with those of one example at a time"
    except Unsupported as problem:
        reason = str(problem)
    tell_once(f"{type(model).__name__} is left to the vmap engine:", f"{reason}.")
    return vmap.clipped_sum(model, inputs, targets, loss, clip)


def taped(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    clip: ClipRule,
    options: Options = DEFAULT,
) -> Answer:
    """As `clipped_sum`, without self-check and without leaving the model to another engine.

    Raises:
        Unsupported: the model cannot be followed.
    """
    examples, views = inputs.shape[:2]
    named = trainable_parameters(model)
    device = next(iter(named.values())).device
    clip_groups = clip.group_of(tuple(named))
    budget, scratch = options.budget_on(device), options.scratch_on(device)
    tape = Tape(model, examples, views, budget, scratch, clip_groups)
    with options.arithmetic(device), tape:
        groups, losses = _forward_and_backward(model, inputs, targets, loss, options, tape)
        with torch.no_grad():
            for group in groups:
                joint.add_squares(group, tape)
            small = [_Small(tape, group) for group in range(len(tape.total))]
            for kept in small:
                kept.add_squares()
            norms = (tape.total[0] if clip_groups is None else torch.stack(tape.total, dim=1)).sqrt()
            finite = torch.isfinite(overall(norms))
            if finite.all():
                total = _weighted(tape, small, clip.coefficients(norms))
    mean_losses = losses.unflatten(0, (examples, views)).mean(1)
    if not finite.all():  # 0 * nan is nan: the others go again, alone
        total = torch.zeros_like(tape.anchor).expand(sum(p.numel() for p in tape.parameters.values())).clone()
        if finite.any():
            total, _, _ = taped(model, inputs[finite], targets[finite], loss, clip, options)
    return total.detach(), norms, mean_losses


def _forward_and_backward(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, options: Options, tape: Tape
) -> tuple[list[joint.Group], Tensor]:
    """Record the call on `tape` and fill every use; returns the losses (B * K,) too."""
    examples, views = inputs.shape[:2]
    rows = inputs.detach().flatten(0, 1)
    if rows.dim() == 4 and options.wants_channels_last(model, rows):
        rows = rows.contiguous(memory_format=torch.channels_last)
    watch = Watch(tape, rows, RULES, generic)
    bfloat16 = options.precision == "bfloat16"
    with torch.enable_grad():
        with torch.autocast("cuda", torch.bfloat16) if bfloat16 else nullcontext(), watch:
            outputs = model(rows)
        if bfloat16 and isinstance(outputs, Tensor):
            outputs = outputs.float()
        losses = loss(outputs, targets.repeat_interleave(views, dim=0))
        check_losses(losses, examples * views)
        hidden = parameters_of(losses, tape)
        if hidden:
            names = ", ".join(tape.names[id(p)] for p in hidden)
            raise Unsupported(f"{names} reach the loss in a way that cannot be seen")
        groups = joint.groups(watch)
        if losses.requires_grad:
            torch.autograd.backward(losses, torch.full_like(losses, 1.0 / views))
    return groups, losses.detach()


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
        """Each use with the weighted sum of its gradients."""
        if self._joined is None:
            return []
        total = coefficients.to(self._joined.dtype) @ self._joined
        parts = total.split([use.weight.numel() for use in self.uses])
        return [(use, part.view(use.weight.shape)) for use, part in zip(self.uses, parts, strict=True)]


def _weighted(tape: Tape, small: list[_Small], coefficients: Tensor) -> Tensor:
    """Sum of coefficient * gradient over examples as a flat vector, pulled back to the parameters.

    Args:
        small: by clip group.
        coefficients: (B,), or (B, G) for each clip group.
    """
    leaves = list(tape.parameters.values())
    factors = [coefficients] if coefficients.dim() == 1 else coefficients.t().contiguous().unbind()
    of_group: list[list[nn.Parameter]] = [[] for _ in small]
    for parameter in leaves:
        of_group[tape.clip_groups[id(parameter)]].append(parameter)
    total = leaves[0].new_empty(sum(p.numel() for p in leaves))
    parts = total.split([p.numel() for p in leaves])
    places = {id(p): part.view(p.shape) for p, part in zip(leaves, parts, strict=True)}
    written: set[int] = set()

    def add(parameter: Tensor, part: Tensor) -> None:
        place = places[id(parameter)]
        if id(parameter) in written:
            place.add_(part)
        elif part.data_ptr() != place.data_ptr():  # not put there already
            place.copy_(part)
        written.add(id(parameter))

    together = {id(use) for kept in small for use in kept.uses}
    for kept, own_factors, own in zip(small, factors, of_group, strict=True):
        for use, part in kept.weighted(own_factors):
            for parameter, pulled in joint.pull_back(use, part, own):
                add(parameter, pulled)
    rest = [use for use in tape.uses if use.filled and id(use) not in together]
    tape.uses.clear()
    while rest:
        use = rest.pop()  # its tensors can go as soon as they are summed
        for group in use.clip_groups:
            out = None if id(use.weight) in written else places.get(id(use.weight))
            total_of_use = use.weighted(factors[group], out)
            for parameter, pulled in joint.pull_back(use, total_of_use, of_group[group]):
                add(parameter, pulled)
    for parameter in leaves:
        if id(parameter) not in written:
            places[id(parameter)].zero_()
    return total
