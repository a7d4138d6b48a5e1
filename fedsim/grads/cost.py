"""What one view costs a model: operations and memory, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

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


def cost(skeleton: nn.Module, view: Batch, target: Batch | None = None, loss: Loss = cross_entropy) -> Cost:
    """Return what one view costs a model on the meta device (`fedsim.models.skeleton`).

    Args:
        skeleton: the model.
        view: inputs (1, ...) of one view, a tensor or named arrays, on any device; values do not matter.
        target: its target (1, ...), likewise; None for a label.
        loss: one loss a view.
    """
    run = _Run(skeleton, view, torch.zeros(1, dtype=torch.long) if target is None else target, loss)
    with FlopCounterMode(display=False) as ahead:
        run.loss(1)
    with FlopCounterMode(display=False) as both:
        run.loss(1).backward()
    skeleton.zero_grad(set_to_none=True)
    one, two = _kept(run, 1), _kept(run, 2)
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


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    view: Batch
    target: Batch
    function: Loss

    def loss(self, views: int) -> Tensor:
        """Mean loss of so many views, on the meta device."""
        meta, dtype = torch.device("meta"), next(self.model.parameters()).dtype
        inputs, targets = (batch.take(part, [0] * views) for part in (self.view, self.target))
        outputs = batch.call(self.model, batch.placed(inputs, meta, dtype))
        return self.function(outputs, batch.placed(targets, meta)).mean()


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
