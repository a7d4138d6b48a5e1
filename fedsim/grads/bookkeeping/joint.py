"""Which uses of weights can be measured apart, and the norms of those that cannot.

Squared norms of several uses add up when they touch different entries of the parameters. A parameter used
twice (tied weights, an embedding that is also the output layer) has cross terms, and a weight computed from
parameters has a norm of its own, or one for each clip group of theirs: there, each example's gradients are
formed, pulled back to the parameters and added before the norm, for as many examples at a time as fit.
"""

from __future__ import annotations

from itertools import combinations

from torch import Tensor, nn

from fedsim.grads.bookkeeping import conv
from fedsim.grads.bookkeeping.mode import is_selection
from fedsim.grads.bookkeeping.tape import Tape, Unsupported, Use
from fedsim.grads.norms import squared_norms


class Group:
    """Uses that must be measured together, and the parameters they reach."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.parameters: dict[int, nn.Parameter] = {}


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


def add_squares(group: Group, tape: Tape) -> None:
    """Add the squared norms of a group to the tape's total, after the backward pass."""
    uses = [use for use in group.uses if use.filled]
    parameters = list(group.parameters.values())
    entries = sum(p.numel() for p in parameters) + sum(use.weight.numel() for use in uses)
    step = max(1, tape.scratch // (entries * tape.anchor.element_size()))
    for low in range(0, tape.examples if uses else 0, step):
        high = min(low + step, tape.examples)
        sums: dict[int, Tensor] = {}
        for use in uses:
            for parameter, part in use.pull_back(use.rows(low, high), use.leaves):
                present = sums.get(id(parameter))
                sums[id(parameter)] = part if present is None else present + part
        for key, total in sums.items():
            tape.total[tape.clip_groups[key]][low:high] += squared_norms(total)
