"""What a GPU would be asked to do, counted without one: operations launched, waits and copies to and from it.

`counted` runs a piece of the engine on tensors without memory (torch's fake and meta tensors), so that the
size of the piece costs nothing, and every operation that depends on values fails unless it is counted as a
wait. From the bytes and multiplications of each operation follows the least time it can take (Williams et al.
2009, roofline).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fedsim.grads import constants, gpu
from fedsim.grads.bookkeeping import Options, precision

_aten = torch.ops.aten
_FREE = """
_has_compatible_shallow_copy_type _reshape_alias _unsafe_view alias as_strided chunk detach device diagonal
dim empty empty_like empty_strided expand is_contiguous is_same_size lift_fresh movedim new_empty
new_empty_strided numel permute promote_types result_type select size slice split split_with_sizes squeeze
squeeze_ storage_offset stride t transpose unbind unfold unsafe_split unsqueeze unsqueeze_ view
"""
_WAITS = """
_local_scalar_dense _unique2 equal is_nonzero item masked_select nonzero repeat_interleave unique_consecutive
unique_dim
"""
FREE, WAITS = frozenset(_FREE.split()), frozenset(_WAITS.split())
"""Operations that only make another view, or ask for what the host knows; and those whose result, or its
size, the host waits for."""


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's figures.

    Attributes:
        bandwidth: bytes a second.
        half, single: multiplications and additions a second of bfloat16 and float32.
        launch: seconds of the smallest operation.
    """

    name: str
    bandwidth: float
    half: float
    single: float
    launch: float = 5e-6


H100 = Card("H100 SXM: 3.35 TB/s, 990 and 67 TFLOP/s", 3.35e12, 990e12, 67e12)


@dataclass
class Count:
    """What was asked.

    Attributes:
        launched: operations that compute or copy, by name.
        waits: operations whose result the host waits for, by name.
        copies: tensors sent to the device or fetched from it.
        seconds: the least time on a card, one operation after the other.
        by: the same, by name.
        by: that of operations by name.
    """

    launched: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    seconds: float = 0.0
    by: Counter[str] = field(default_factory=Counter)


class Spy(TorchDispatchMode):
    """Counts what passes.

    Args:
        card: whose time is estimated.
        answer: what a wait is told, where values are not there to be asked.
    """

    def __init__(self, card: Card = H100, answer: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.count = Count()
        self._card, self._answer = card, answer
        self._whole = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if self._whole:
            return func(*args, **kwargs)
        if name in WAITS:
            self.count.waits[name] += 1
            if name == "_local_scalar_dense" and self._answer is not None:
                return self._answer(args[0])
        result = func(*args, **kwargs)
        given, made = (_tensors(values) for values in ((args, kwargs), result))
        if {t.device.type for t in given if t.dim()} | {t.device.type for t in made} >= {"cpu", "meta"}:
            self.count.copies += 1
        if name not in FREE and name not in WAITS and (made or name.endswith("_")):
            flops = flop_registry.get(func.overloadpacket)
            done = flops(*args, **kwargs, out_val=result) if flops else 0
            self._add(name, given, made, done)
        return result

    def _add(self, name: str, given: list[Tensor], made: list[Tensor], flops: int) -> None:
        card = self._card
        half = any(t.dtype == torch.bfloat16 for t in given)
        moved = sum(t.numel() * t.element_size() for t in (*given, *made))
        self.count.launched[name] += 1
        most = max(moved / card.bandwidth, flops / (card.half if half else card.single))
        self.count.seconds += max(card.launch, most)
        self.count.by[name] += max(card.launch, most)

    def added_as_one(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """`precision.add_of_halves`, one operation on a GPU."""
        self._whole = True
        try:
            total.baddbmm_(left.float(), right.float())
        finally:
            self._whole = False
        self._add("baddbmm", [left, right, total], [total], 2 * total.numel() * left.shape[-1])
        return total

    def as_one(self, operation: Any, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """`precision.of_halves`, one operation on a GPU."""
        self._whole = True
        try:
            result: Tensor = operation(left.float(), right.float())
            result = result if out is None else out.copy_(result)
        finally:
            self._whole = False
        self._add(operation.__name__, [left, right], [result], 2 * result.numel() * left.shape[-1])
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextmanager
def as_on_a_gpu(spy: Spy) -> Iterator[None]:
    """Go the ways of GPUs, in any precision, on whatever device the tensors are."""
    constants.spread.cache_clear()
    with (
        mock.patch.object(gpu, "on", return_value=True),
        mock.patch.object(precision, "of_halves", spy.as_one),
        mock.patch.object(precision, "add_of_halves", spy.added_as_one),
        mock.patch.object(Options, "check_device"),
    ):
        yield
    constants.spread.cache_clear()


def counted(
    model: nn.Module, shapes: tuple[int, ...], work: Callable[[nn.Module, Tensor, Tensor], Any], warm: int = 0
) -> Count:
    """Count what `work(model, inputs, targets)` asks of a GPU, after `warm` calls that do not count.

    Args:
        shapes: of the inputs, (B, K, ...); targets are (B,).
    """
    spy = Spy(answer=lambda asked: True if asked.dtype == torch.bool else 1.0)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        twin = _faked(model, fake)
        inputs, targets = torch.empty(shapes), torch.zeros(shapes[0], dtype=torch.int64)
        with as_on_a_gpu(spy):
            for _ in range(warm):
                with spy:
                    work(twin, inputs, targets)
                spy.count = Count()
            with spy:
                work(twin, inputs, targets)
    return spy.count


def _faked(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                own = fake.from_tensor(parameter.data)
                module._parameters[name] = nn.Parameter(own, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)
    return twin
