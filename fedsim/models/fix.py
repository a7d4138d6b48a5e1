"""Replacing what per-example gradients do not allow, as `model.fix` asks."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from fedsim.models.check import mixes_examples, random_rate

_log = logging.getLogger(__name__)
_LIST = "replaced_by_model_fix"
_MOST_GROUPS = 32


class GroupNormAct(nn.GroupNorm):
    """Group norm, then what a norm layer with an activation of its own does: timm's BatchNormAct2d."""

    def __init__(self, groups: int, channels: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(groups, channels, eps)
        self.drop, self.act = drop, act

    def forward(self, input: Tensor) -> Tensor:
        """Map (n, channels, ...) to the same shape."""
        return self.act(self.drop(super().forward(input)))


def fix(model: nn.Module) -> nn.Module:
    """Replace, in place, batch norm by group norm, in-place layers by their selves and random rates by 0.

    A batch norm in eval mode with its running statistics is frozen, and left alone; so is one whose class
    computes something else, which `check` then refuses. Gains, shifts and eps are taken over, running
    statistics are not. The number of groups is the largest up to 32 that divides the channels and leaves at
    least two to a group: alone in a group, a channel would lose its mean. `BatchNorm1d` gives one group, for
    without positions to average over groups of a few channels would leave little but signs.

    Args:
        model: in the modes it will be trained in.

    Returns:
        The model; another one only if it is itself a batch norm. `fixed` lists what was replaced.
    """
    said: list[str] = []
    norms: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        where = f"{path}: " if path else ""
        new = _group_norm(module) if mixes_examples(module) else None
        if new is not None:
            norms[id(module)] = new
            said.append(f"{where}{_norm_shown(module)} -> {_norm_shown(new)}")
        if getattr(module, "inplace", False) is True:
            module.inplace = False
            said.append(f"{where}{type(module).__name__}(inplace=True) -> {type(module).__name__}()")
        name, rate = random_rate(module)
        if rate and module.training:
            setattr(module, name, 0.0)
            kind = type(module).__name__
            said.append(f"{where}{kind}({name}={rate:g}) -> {kind}({name}=0)")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in norms:
                setattr(parent, name, norms[id(child)])
    model = norms.get(id(model), model)
    if said:
        _log.info("model.fix replaced %s", "; ".join(said))
    setattr(model, _LIST, tuple(said))
    return model


def fixed(model: nn.Module) -> tuple[str, ...]:
    """Return what `model.fix` replaced: "features.1: BatchNorm2d(64) -> GroupNorm(32, 64)", one a layer."""
    return getattr(model, _LIST, ())


def _group_norm(module: nn.Module) -> nn.GroupNorm | None:
    """Return what stands in for a batch norm of a kind that is known; None for anything else."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.num_features:
        return None  # lazy ones do not know their channels yet
    channels = module.num_features
    groups = 1 if isinstance(module, nn.BatchNorm1d) else _groups(channels)
    drop, act = (getattr(module, name, None) for name in ("drop", "act"))
    new: nn.GroupNorm
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        new = GroupNormAct(groups, channels, module.eps, drop, act)
    elif type(module).forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward):
        new = nn.GroupNorm(groups, channels, module.eps)
    else:
        return None
    new.affine = module.affine
    new.weight, new.bias = module.weight, module.bias  # with dtype, device, and whether they are trained
    return new


def _groups(channels: int) -> int:
    most = min(_MOST_GROUPS, channels // 2)
    return next((n for n in range(most, 1, -1) if channels % n == 0), 1)


def _norm_shown(module: nn.Module) -> str:
    if isinstance(module, nn.GroupNorm):
        return f"{type(module).__name__}({module.num_groups}, {module.num_channels})"
    return f"{type(module).__name__}({module.num_features})"
