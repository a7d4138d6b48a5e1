"""Ways to the clipped gradients, the fastest first: whatever ends one starts the next.

The chosen engine; then vmap over the whole model; then one example at a time by autograd. They differ in
speed alone, so which of them answers matters to the clock only, and one log line says it. What worked is
remembered, so that a way that ended is not tried again in every call; nothing else relies on that memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fedsim.grads import arithmetic, batch
from fedsim.grads.batch import Batch
from fedsim.grads.batch_size import OverLimit
from fedsim.grads.flat import trainable_parameters
from fedsim.grads.microbatch import Loss
from fedsim.grads.state import left_as_found
from fedsim.validate import InputError

Result = TypeVar("Result")
LAST = "autograd"
"""The way that serves every model."""

_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass
class _Known:
    """Of one model: the way that worked, by form of a call, and the log lines that were written."""

    worked: dict[tuple[object, ...], str] = field(default_factory=dict)
    told: set[tuple[str, ...]] = field(default_factory=set)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def first_that_works(
    ways: Mapping[str, Callable[..., Result]],
    model: nn.Module,
    inputs: Batch,
    targets: Batch,
    loss: Loss,
    *rest: Any,
) -> Result:
    """Return `way(model, inputs, targets, loss, *rest)` of the first of `ways` that does not raise.

    Every way gets copies of inputs and targets of its own, on the parameters' device, floating inputs in
    their dtype, and the model as it came. Models with hooks on their backward pass go straight to `LAST`,
    which alone calls them.

    Args:
        ways: by name, in the order they are tried; `LAST` is one of them.

    Raises:
        InputError: no way gives the gradients; or one of them says what is wrong with model, loss or rule.
        MemoryError, torch.OutOfMemoryError, OverLimit: as they come: they say nothing about a way.
    """
    first = next(iter(trainable_parameters(model).values()))
    key = (tuple(ways), batch.form(inputs), batch.form(targets), first.dtype, first.device, code_of(loss))
    names = list(ways)
    with _lock:
        known = _known.setdefault(model, _Known())
        begin = known.worked.get(key, names[0])
    ended: list[str] = []
    kind: tuple[str, ...] = ()
    if begin != LAST and (hooked := _hook_on_backward(model)):
        begin, kind = LAST, (hooked,)
        ended.append(f"the model has {hooked}, which the faster ways do not call")
    for name in names[names.index(begin) :]:
        own = batch.placed(inputs, first.device, first.dtype)
        try:
            with torch.inference_mode(False), arithmetic.float32(), left_as_found(model):
                answer = ways[name](model, own, batch.placed(targets, first.device), loss, *rest)
        except Exception as problem:
            if isinstance(problem, InputError) or out_of_memory(problem):
                raise
            where = _where(problem, model)
            kind += (name, where, type(problem).__name__)
            ended.append(f"{name} ended{where} by {_said(problem)}")
            if name == names[-1]:
                raise InputError(
                    "model and loss must run, and be differentiable, on the views of one example alone, but "
                    f"no way gives gradients of {type(model).__name__}: {'; '.join(ended)}. Inputs are "
                    f"{batch.described(inputs)}, targets {batch.described(targets)}: check that they are "
                    "what model and loss expect."
                ) from problem
        else:
            with _lock:
                known.worked[key] = name
                new = bool(kind) and kind not in known.told
                known.told.add(kind)
            if new:
                by = "autograd, one example at a time" if name == LAST else f"{name} over the whole model"
                _log.warning("gradients of %s come from %s: %s.", type(model).__name__, by, "; ".join(ended))
            return answer
    raise AssertionError("unreachable: the last way returns or raises")


def out_of_memory(problem: Exception) -> bool:
    """Whether an exception is about memory, and says nothing about model and way."""
    if isinstance(problem, MemoryError | torch.OutOfMemoryError | OverLimit):
        return True
    # torch on the CPU, and the libraries under it on CUDA
    words = ("can't allocate memory", "ALLOC_FAILED", "out of memory")
    return isinstance(problem, RuntimeError) and any(word in str(problem) for word in words)


def code_of(loss: Loss) -> object:
    """Return what a loss has in common with itself written anew in every call: its code."""
    return getattr(loss, "__code__", None) or type(loss)


def _hook_on_backward(model: nn.Module) -> str:
    """Name a hook that acts on gradients and that only an ordinary backward pass calls; "" if there is none.

    Raises:
        InputError: a hook on accumulated gradients; there are none here.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise InputError(
                f"parameter {name} must not have a hook by register_post_accumulate_grad_hook: it acts on "
                ".grad, which per-example gradients never reach. Remove it, or use register_hook, which acts "
                "on each example's gradient."
            )
        if parameter._backward_hooks:
            return f"a hook on the gradient of {name}"
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return f"a backward hook on {type(module).__name__} '{path}'"
    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return "a backward hook for all modules"
    return ""


def _where(problem: Exception, model: nn.Module) -> str:
    """Return " at 'path' (Kind)" for the innermost module that was running; "" if that cannot be seen."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for running in _selves(problem):
        if paths.get(id(running)):
            found = f" at '{paths[id(running)]}' ({type(running).__name__})"
    return found


def _selves(problem: Exception) -> Iterator[object]:
    step = problem.__traceback__
    while step is not None:
        yield step.tb_frame.f_locals.get("self")
        step = step.tb_next


def _said(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0][:200].rstrip('.')}" if lines else type(problem).__name__
