"""The tape of one call: which operation used which weight, and what every example's gradient of it is.

Nothing here outlives the call, but bare memory (`memory.Blocks`), and threads share nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsim.grads import gpu
from fedsim.grads.arithmetic import products
from fedsim.grads.bookkeeping.memory import Blocks
from fedsim.grads.bookkeeping.precision import squared_norms

Place = Callable[[Tensor], Tensor | None]
Pulled = list[tuple[nn.Parameter, Tensor]]


class Unsupported(Exception):
    """The model does something the tape cannot follow: per-example gradients must be found another way."""


class Use(ABC):
    """One use of one weight by one operation.

    `weight` is a trainable parameter, or a tensor computed from trainable parameters alone (a standardised
    kernel, a slice). An operation with a bias makes two uses. The backward pass fills a use; `squares` may
    then be asked once, `weighted` once, and `rows` any number of times.

    Attributes:
        tape: where the use belongs.
        weight: the tensor used; its autograd graph, if any, leads to parameters only.
        alone: no other use reaches the same entries of a parameter, and squared norms of gradients of
            `weight` are those of the parameter. Otherwise norms are taken over all uses together.
        closed: norms over the parameters `weight` was computed from are known in closed form.
        filled: the backward pass reached the operation.
        leaves: the parameters it reaches.
        doubt: with `squares`, how much more (B,) they may be, by their own rounding and by that of what the
            example adds to the sum; None where that is below 1e-6.
        version: of `weight`, to tell whether it was changed in place after the use.
        clip_groups: the clip groups of the parameters it reaches; one group if it stands alone.
    """

    def __init__(self, tape: Tape, weight: Tensor) -> None:
        if weight.is_complex():  # the rules' products conjugate nothing
            raise Unsupported(f"a weight in complex numbers, {tuple(weight.shape)}, meets examples")
        self.tape = tape
        self.weight = weight
        self.alone = True
        self.filled = False
        self.closed = False
        self.leaves = tape.parameters_of(weight)
        if not isinstance(weight, nn.Parameter):
            tape.check_way_back(weight)
        self.version = weight._version
        self.doubt: Tensor | None = None
        self.clip_groups: tuple[int, ...] = (0,)

    @abstractmethod
    def squares(self) -> Tensor:
        """Squared norms (B,) float64 of the per-example gradients of `weight`."""

    @abstractmethod
    def rows(self, low: int, high: int) -> Tensor:
        """Per-example gradients (high - low, *weight.shape) of the examples low .. high - 1."""

    def terms(self) -> Tensor | None:
        """Bound (B,) float64 on the lengths of the terms, place by place, that an example's gradient adds up.

        Where they cancel, digits depend on who shares the batch. None: they are added one after the other.
        """
        return None

    @abstractmethod
    def weighted(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum over examples of coefficient * gradient, in the shape of `weight`.

        Args:
            out: of that shape, contiguous: the sum may be put there, which saves a copy.
        """

    def pull_back(
        self, gradient: Tensor, parameters: Sequence[nn.Parameter], place: Place | None = None
    ) -> Pulled:
        """Turn a gradient of `weight` into gradients of those among its `leaves` that are in `parameters`.

        Args:
            gradient: in the shape of `weight`, or with an axis of examples before, as the results then have.
            place: where the gradient of a parameter may be put; None if there are examples.
        """
        if isinstance(self.weight, nn.Parameter):
            return [(self.weight, gradient)]
        batched = gradient.dim() > self.weight.dim()
        # One example alone must come back with the bits it has among others: reductions of one row differ.
        single = batched and len(gradient) == 1
        found = torch.autograd.grad(
            self.weight,
            parameters,
            (gradient.repeat(2, *[1] * self.weight.dim()) if single else gradient).to(self.weight.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        parts = [(p, part) for p, part in zip(parameters, found, strict=True) if part is not None]
        return [(p, part[:1]) for p, part in parts] if single else parts


class Rows(Use):
    """A use whose per-example gradients are small, or kept in any case: biases, norm layers, positions."""

    gradients: Tensor

    def fill(self, gradients: Tensor) -> None:
        """Take gradients (B, m, *weight.shape); m parts of one example are added. m may have no axis."""
        count = self.tape.examples
        flat = gradients.reshape(count, -1, self.weight.numel())
        wide = torch.promote_types(flat.dtype, torch.float32)
        self.gradients = flat[:, 0].to(wide) if flat.shape[1] == 1 else flat.sum(1, dtype=wide)
        self.tape.arrived(self)

    def squares(self) -> Tensor:
        """See `Use.squares`."""
        return squared_norms(self.gradients)

    def rows(self, low: int, high: int) -> Tensor:
        """See `Use.rows`."""
        return self.gradients[low:high].reshape(high - low, *self.weight.shape)

    def weighted(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Use.weighted`."""
        return (coefficients.to(self.gradients.dtype) @ self.gradients).reshape(self.weight.shape)


AnyUse = TypeVar("AnyUse", bound=Use)


class Tape:
    """What one call has recorded.

    Attributes:
        model: whose parameters they are.
        examples: B.
        parameters: trainable parameters by id, in the order of `named_parameters`.
        names: their names by id.
        grouped: whether norms are asked for by clip group.
        clip_groups: the clip group of each, by id; 0 where all are clipped together.
        budget: bytes that per-example gradients kept until the end may take, beyond what holding output
            gradients instead would take.
        scratch: bytes one temporary may take.
        anchor: an input of every recorded operation, so that autograd visits it.
        gpu: the call is to go the ways of GPUs.
        reduced: forward and backward pass multiply with fewer bits; what is measured and summed does not.
        total: for each clip group, squared norms (B,) of the gradients' parts in it; one without groups.
        doubt: of each of `total`, (B,); see `Use.doubt`.
        doubted: there is any.
        uses: in the order of the forward pass.
        after_backward: what fills uses that several operations share.
        blocks: memory for what stays until the end of the call.
    """

    def __init__(
        self,
        model: nn.Module,
        named: dict[str, nn.Parameter],
        examples: int,
        budget: int,
        scratch: int,
        clip_groups: Sequence[int] | None = None,
    ) -> None:
        self.examples = examples
        self.reduced = False
        self.budget = budget
        self.scratch = scratch
        self.grouped = clip_groups is not None
        computed = [name for name, parameter in named.items() if not parameter.is_leaf]
        if computed:  # the graph of a use of one leads to what it was computed from, not to it
            raise Unsupported(f"parameters that are computed from others: {', '.join(computed)}")
        self.parameters = {id(parameter): parameter for parameter in named.values()}
        self.names = {id(parameter): name for name, parameter in named.items()}
        first = next(iter(named.values()))
        self.anchor = torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)
        self.gpu = gpu.on(self.anchor)
        groups = [0] * len(self.parameters) if clip_groups is None else clip_groups
        self.clip_groups = dict(zip(self.parameters, groups, strict=True))
        self.total = [
            torch.zeros(examples, dtype=torch.float64, device=first.device) for _ in range(max(groups) + 1)
        ]
        self.doubt = [torch.zeros_like(total) for total in self.total]
        self.doubted = False
        self.uses: list[Use] = []
        self.after_backward: list[Callable[[], None]] = []
        self.blocks = Blocks(budget)
        self.model = model

    def __enter__(self) -> Tape:
        return self

    def __exit__(self, *problem: object) -> None:
        # Uses and tape refer to each other: without this, their memory waits for the cycle collector.
        self.uses.clear()
        self.after_backward.clear()
        self.blocks.leave()

    @cached_property
    def owners(self) -> dict[int, nn.Module]:
        """The module each parameter is registered in, by id."""
        found: dict[int, nn.Module] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                found.setdefault(id(parameter), module)
        return found

    def parameters_of(self, tensor: Tensor) -> list[nn.Parameter]:
        """Return the trainable parameters that `tensor` is, or that its autograd graph leads to.

        From a loss, this finds parameters that took a way the tape did not see: recorded operations take
        their weights detached, so that nothing else links the loss to a parameter.
        """
        if id(tensor) in self.parameters:
            return [self.parameters[id(tensor)]]
        found: dict[int, nn.Parameter] = {}
        for node in _graph(tensor):
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.parameters:
                found[id(variable)] = self.parameters[id(variable)]
        return list(found.values())

    def check_way_back(self, weight: Tensor) -> None:
        """Raise Unsupported unless a gradient of `weight` may come back to the parameters part by part.

        A custom function may do anything with a gradient, such as clamp it; torch's own are linear in it.
        """
        custom = torch.autograd.function.BackwardCFunction
        if weight._backward_hooks or any(isinstance(node, custom) for node in _graph(weight)):
            raise Unsupported("a weight is computed by a custom function, or has a hook")

    def use(self, use: AnyUse) -> AnyUse:
        """Record a use during the forward pass."""
        self.uses.append(use)
        return use

    def arrived(self, use: Use) -> None:
        """Take note that the backward pass filled `use`, and add its squared norms if it stands alone."""
        use.filled = True
        if use.alone and not isinstance(use, Rows):
            group = use.clip_groups[0]
            with products("ieee") if self.reduced else nullcontext():
                self.total[group] += use.squares()
            if use.doubt is not None:
                self.doubt[group] += use.doubt
                self.doubted, use.doubt = True, None

    def positions(self, tensor: Tensor) -> Tensor:
        """Reshape (B, ..., d) to (B, positions, d): all views and places of an example on one axis."""
        return tensor.reshape(self.examples, -1, tensor.shape[-1])

    def reserve(self, kept: int, held: int) -> bool:
        """Whether `kept` bytes may stay until the end where `held` bytes would otherwise; books them."""
        extra = max(0, kept - held)
        if extra > self.budget:
            return False
        self.budget -= extra
        return True


def _graph(tensor: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph that `tensor` came from, once."""
    seen: set[Any] = set()
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [following for following, _ in node.next_functions]
