"""Which uses of weights can be measured apart, and the norms of those that cannot.

Squared norms of several uses add up when they touch different entries of the parameters. A parameter used
twice (tied weights, an embedding that is also the output layer) has cross terms, and a weight computed from
parameters has a norm of its own, or one for each clip group of theirs: there, each example's gradients are
formed, pulled back to the parameters and added before the norm, for as many examples at a time as fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from fedsim.grads.bookkeeping import conv
from fedsim.grads.bookkeeping.mode import is_selection
from fedsim.grads.bookkeeping.precision import of_sum, squared_norms
from fedsim.grads.bookkeeping.tape import Pulled, Tape, Unsupported, Use


class Group:
    """Uses that must be measured together, and the parameters they reach.

    Norms and sum come from the same formed gradients, kept where the budget allows and formed again where
    not: whatever cancels between the uses, or on the way back to the parameters, an example adds what was
    measured.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.parameters: dict[int, nn.Parameter] = {}
        self._kept: list[_Piece] | None = None

    def add_squares(self, tape: Tape) -> None:
        """Add the squared norms to the tape's total, after the backward pass."""
        size = sum(p.numel() for p in self.parameters.values()) * tape.examples * tape.anchor.element_size()
        keep = tape.reserve(size, 0)
        pieces = []
        for piece in self._pieces(tape):
            own = slice(piece.low, piece.high)
            for key, gradients in piece.gradients.items():
                squares = squared_norms(gradients)
                group = tape.clip_groups[key]
                tape.total[group][own] += squares
                tape.doubted = True
                tape.doubt[group][own] += of_sum(gradients.dtype) * piece.rounded * squares.sqrt()
            if keep:
                pieces.append(piece)
        self._kept = pieces if keep else None

    def weighted(self, tape: Tape, factors: Sequence[Tensor]) -> Pulled:
        """Sums over examples of factor * gradient; one vector (B,) of factors a clip group."""
        sums: dict[int, Tensor] = {}
        for piece in self._pieces(tape) if self._kept is None else self._kept:
            for key, gradients in piece.gradients.items():
                own = factors[tape.clip_groups[key]][piece.low : piece.high].to(gradients.dtype)
                part = own @ gradients.reshape(len(own), -1)
                sums[key] = sums[key] + part if key in sums else part
        return [(self.parameters[key], part) for key, part in sums.items()]

    def _pieces(self, tape: Tape) -> Iterator[_Piece]:
        """Gradients of a few examples at a time, pulled back to the parameters and added over the uses."""
        uses = [use for use in self.uses if use.filled]
        entries = sum(p.numel() for p in self.parameters.values()) + sum(use.weight.numel() for use in uses)
        step = max(1, tape.scratch // (entries * tape.anchor.element_size()))
        stretches = [1.0 if is_selection(use.weight) else _stretch(use) for use in uses]
        terms = [use.terms() for use in uses]
        for low in range(0, tape.examples if uses else 0, step):
            high = min(low + step, tape.examples)
            piece = _Piece(low, high, {}, torch.zeros_like(tape.total[0][low:high]))
            for use, stretch, own in zip(uses, stretches, terms, strict=True):
                rows = use.rows(low, high)
                if not is_selection(use.weight):
                    piece.rounded += 16.0 * stretch * squared_norms(rows).sqrt()
                if own is not None:
                    piece.rounded += 2.0 * stretch * own[low:high]
                for parameter, part in use.pull_back(rows, use.leaves):
                    present = piece.gradients.get(id(parameter))
                    piece.gradients[id(parameter)] = part if present is None else present + part
            yield piece


@dataclass
class _Piece:
    """Gradients (high - low, ...) of the examples low .. high - 1, by parameter."""

    low: int
    high: int
    gradients: dict[int, Tensor]
    rounded: Tensor  # (high - low,) lengths of what was rounded before it could cancel


def _stretch(use: Use) -> Tensor:
    """How much longer the way back to the parameters makes a gradient of `use.weight`, one of no direction.

    What comes back much shorter than that has cancelled, and its digits depend on who shares the batch.
    """
    weight = use.weight
    steps = torch.arange(weight.numel(), dtype=torch.float64, device=weight.device) + 1.0
    probe = (steps * (steps + 1.0).sqrt()).sin().to(weight.dtype).view(weight.shape)
    back = [torch.linalg.vector_norm(part).double() for _, part in use.pull_back(probe, use.leaves)]
    return torch.stack(back).square().sum().sqrt() / torch.linalg.vector_norm(probe).double().clamp(min=1e-30)


def groups(tape: Tape) -> list[Group]:
    """Sort the recorded uses, after the forward pass.

    Sets their `clip_groups` and `alone`, and returns the groups of those that do not stand alone.

    Raises:
        Unsupported: a weight was changed in place after it was used, so that its graph is of other values.
    """
    uses = tape.uses
    by_parameter: dict[int, list[int]] = {}
    conv.settle(uses)
    for index, use in enumerate(uses):
        if use.weight._version != use.version:
            raise Unsupported(f"a weight {tuple(use.weight.shape)} is changed in place after it was used")
        for parameter in use.leaves:
            by_parameter.setdefault(id(parameter), []).append(index)
        use.clip_groups = tuple(sorted({tape.clip_groups[id(p)] for p in use.leaves}))
        use.alone = (use.closed or is_selection(use.weight)) and len(use.clip_groups) == 1
    for indices in by_parameter.values():
        if len(indices) > 1 and any(
            not _apart(uses[a].weight, uses[b].weight) for a, b in combinations(indices, 2)
        ):
            for index in indices:
                uses[index].alone = False
    found_groups: list[Group] = []
    for use in uses:
        if use.alone:
            continue
        group = Group()
        group.uses.append(use)
        group.parameters.update({id(p): p for p in use.leaves})
        for other in [g for g in found_groups if g.parameters.keys() & group.parameters.keys()]:
            found_groups.remove(other)
            group.uses = other.uses + group.uses
            group.parameters = other.parameters | group.parameters
        found_groups.append(group)
    return found_groups


def _apart(first: Tensor, second: Tensor) -> bool:
    """Whether two selections of one parameter share no entry: runs of memory, one after the other."""
    if not (first.is_contiguous() and second.is_contiguous()):
        return False
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    low, high = sorted((first, second), key=lambda tensor: int(tensor.storage_offset()))
    return int(low.storage_offset()) + low.numel() <= int(high.storage_offset())
