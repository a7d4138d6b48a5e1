"""What one view costs a model: operations and memory, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


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


def cost(skeleton: nn.Module, shape: tuple[int, ...]) -> Cost:
    """Return what one view of `shape` costs a model on the meta device (`fedsim.models.skeleton`)."""
    with FlopCounterMode(display=False) as ahead:
        _loss(skeleton, shape, 1)
    with FlopCounterMode(display=False) as both:
        _loss(skeleton, shape, 1).backward()
    skeleton.zero_grad(set_to_none=True)
    one, two = _kept(skeleton, shape, 1), _kept(skeleton, shape, 2)
    parameters = list(skeleton.parameters())
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        forward=ahead.get_total_flops(),
        backward=both.get_total_flops() - ahead.get_total_flops(),
        saved_bytes=two[0] - one[0],
        output_bytes=two[1] - one[1],
        fixed_bytes=max(0, 2 * one[0] - two[0]),
    )


def _loss(model: nn.Module, shape: tuple[int, ...], views: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs = torch.empty(views, *shape, dtype=dtype, device="meta")
    outputs = model(inputs)
    targets = torch.zeros(views, dtype=torch.long, device="meta")
    return F.cross_entropy(outputs, targets)


def _kept(model: nn.Module, shape: tuple[int, ...], views: int) -> tuple[int, int]:
    """Return (bytes saved for the backward pass but for parameters, bytes of outputs of trainable layers)."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}
    outputs = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel() * output.element_size()

    trained = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    hooks = [module.register_forward_hook(count) for module in trained]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _loss(model, shape, views)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(storage.nbytes() for storage in saved.values()), outputs
