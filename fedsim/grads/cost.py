"""What one view costs a model: operations and memory, counted on the meta device or on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim.grads import batch
from fedsim.grads.batch import Batch
from fedsim.grads.microbatch import Loss
from fedsim.grads.per_example import cross_entropy


@dataclass(frozen=True)
class Cost:
    """Of a forward and backward pass without privacy.

    Attributes:
        parameters: number of them, and of the trainable ones.
        trainable: parameters that are trained.
        forward: floating-point operations of one view; a multiplication with its addition counts as two.
            Matrix products and convolutions are counted, elementwise operations are not.
        backward: those of the backward pass; a frozen prefix and the first layer's input need none.
        saved_bytes: tensors one view keeps for the backward pass.
        output_bytes: outputs of all layers with parameters, one view: what an engine keeps as their gradients
            that forms per-example norms layer by layer.
        fixed_bytes: tensors kept for the backward pass whatever the batch, such as standardised kernels.
    """

    parameters: int
    trainable: int
    forward: int
    backward: int
    saved_bytes: int
    output_bytes: int
    fixed_bytes: int

    @property
    def training(self) -> int:
        """Operations of one view, forward and backward."""
        return self.forward + self.backward


def cost(model: nn.Module, view: Batch, target: Batch | None = None, loss: Loss = cross_entropy) -> Cost:
    """Return what one view costs a model.

    Args:
        model: on the meta device (`fedsim.models.skeleton`), or on the CPU: with the same result, by
            computing it a few times. That is for small ones: torch's compiler, which the meta device needs,
            takes two seconds to import.
        view: inputs (1, ...) of one view, a tensor or named arrays, on any device; values do not matter.
        target: its target (1, ...), likewise; None for a label.
        loss: one loss a view.
    """
    run = _Run(model, view, torch.zeros(1, dtype=torch.long) if target is None else target, loss)
    with _plain_kernels():
        with _Operations() as ahead:
            run.loss(1)
        with _Operations() as both:
            run.loss(1).backward()
        model.zero_grad(set_to_none=True)
        one, two = _kept(run, 1), _kept(run, 2)
    parameters = list(model.parameters())
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        forward=ahead.count,
        backward=both.count - ahead.count,
        saved_bytes=two[0] - one[0],
        output_bytes=two[1] - one[1],
        fixed_bytes=max(0, 2 * one[0] - two[0]),
    )


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Have the CPU compute as the meta device does: by kernels that are made of those in _FORMULAS."""
    mkldnn: Any = torch.backends.mkldnn
    fused = mkldnn.enabled
    mkldnn.enabled = False  # its `flags` would warn of TF32
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mkldnn.enabled = fused


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    """Of matrices (..., n, m) and (..., m, p)."""
    return 2 * left.numel() * right.shape[-1]


def _convolution(out: Tensor, inputs: Tensor, weight: Tensor, *rest: Any) -> int:
    """`rest`: bias, stride, padding, dilation, transposed and more, as aten has them."""
    positions = inputs if rest[4] else out
    return 2 * positions.numel() // positions.shape[1] * weight.numel()


def _convolution_backward(out: Any, gradient: Tensor, inputs: Tensor, weight: Tensor, *rest: Any) -> int:
    """One convolution for the gradient of the inputs, one for that of the weight, where they are asked."""
    wanted = rest[-1]
    return _convolution(gradient, inputs, weight, *rest) * (bool(wanted[0]) + bool(wanted[1]))


_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mm: _product,
    _aten.bmm: _product,
    _aten.addmm: lambda out, _, *factors: _product(out, *factors),
    _aten.baddbmm: lambda out, _, *factors: _product(out, *factors),
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
}


class _Operations(TorchDispatchMode):
    """Adds up the operations of what runs within, under `_plain_kernels`.

    torch's FlopCounterMode counts the same, but imports Triton and torch's compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; otherwise the first operation imports the compiler

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := _FORMULAS.get(func.overloadpacket)) is not None:
            self.count += formula(out, *args)
        return out


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    view: Batch
    target: Batch
    function: Loss

    def loss(self, views: int) -> Tensor:
        """Mean loss of so many views, where the model is."""
        some = next(self.model.parameters())
        inputs, targets = (batch.take(part, [0] * views) for part in (self.view, self.target))
        outputs = batch.call(self.model, batch.placed(inputs, some.device, some.dtype))
        return self.function(outputs, batch.placed(targets, some.device)).mean()


def _kept(run: _Run, views: int) -> tuple[int, int]:
    """Return (bytes saved for the backward pass but for parameters, bytes of outputs of trainable layers)."""
    own = {p.untyped_storage()._cdata for p in run.model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}
    outputs = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    def count(module: nn.Module, _: object, output: object) -> None:
        nonlocal outputs
        outputs += sum(x.numel() * x.element_size() for x in tree_leaves(output) if isinstance(x, Tensor))

    trained = [m for m in run.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    hooks = [module.register_forward_hook(count) for module in trained]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run.loss(views)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(storage.nbytes() for storage in saved.values()), outputs
