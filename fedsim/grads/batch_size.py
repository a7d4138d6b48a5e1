"""How many examples to send through the model at once: as many as still make it faster and fit in memory.

`choose` is the search, a function of what it is told a size costs; `measure` tells it by running the real
call. On the CPU memory is counted, not observed: the bytes of all tensors alive at once, which is the same
in every run and needs nothing of the operating system. On CUDA the caching allocator is asked.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim.grads.bookkeeping.memory import let_go
from fedsim.validate import InputError

GAIN = 0.05  # a size that is not this much faster an example than its half is not worth its memory
FROM = 8  # smaller sizes only teach what the next one takes
SLOW = 10.0  # seconds of one call above which no larger size is tried
REPEATS, ENOUGH = 3, 0.5  # a size is timed so often, or twice where that takes so many seconds


@dataclass(frozen=True)
class Cost:
    """What one call takes.

    Attributes:
        memory: bytes, the most in use at once beyond what was in use before.
        seconds: the shortest of a few calls.
    """

    memory: int
    seconds: float


@dataclass(frozen=True)
class Choice:
    """What was chosen and why.

    Attributes:
        examples: at once.
        stopped: why no larger size was tried.
        costs: of every size that was run, by examples.
    """

    examples: int
    stopped: str
    costs: Mapping[int, Cost]

    @property
    def cost(self) -> Cost:
        """Cost of the chosen size."""
        return self.costs[self.examples]


Measure = Callable[[int, int], Cost | None]
"""(examples, limit in bytes) -> cost of a call on them, or None where it would have gone over the limit and
was cut off."""


def choose(measure: Measure, limit: int, most: int) -> Choice:
    """Choose the number of examples of a physical batch.

    Sizes 1, 2, 4, ... are measured. One is never run whose memory, continued in a straight line from the two
    before it (from one: in proportion), is above `limit`; and `measure` cuts off a run that the line
    underrates. The search ends there, at the first size above `FROM` at which an example is not faster by
    `GAIN` than at half of it, at one whose call takes `SLOW`, or at one that holds `most` examples. Of the
    sizes run, the smallest is chosen whose time an example is within `GAIN` of the best.

    Args:
        measure: what a size costs.
        limit: bytes.
        most: examples there ever are to share one batch.

    Raises:
        InputError: one example does not fit.
    """
    costs: dict[int, Cost] = {}
    size, stopped = 1, ""
    while not stopped:
        found = measure(size, limit) if _predicted(costs, size) <= limit else None
        if found is None or found.memory > limit:
            stopped = "memory limit"
            break
        costs[size] = found
        if size >= most:
            stopped = "whole batch"
        elif size > FROM and found.seconds / size > (1 - GAIN) * costs[size // 2].seconds / (size // 2):
            stopped = "no faster"
        elif found.seconds > SLOW:
            stopped = "slow"
        size *= 2
    if not costs:
        raise InputError(
            "engine.memory_limit must hold the clipped gradient of one example with all its views; "
            f"{limit:,} bytes do not. Raise it or free memory, lower train.augment_multiplicity, or take a "
            "smaller model."
        )
    best = min(cost.seconds / n for n, cost in costs.items())
    chosen = min(n for n, cost in costs.items() if cost.seconds / n <= best * (1 + GAIN))
    return Choice(chosen, stopped, costs)


def _predicted(costs: Mapping[int, Cost], size: int) -> float:
    """Bytes a size will take, from those already measured; 0 without any."""
    known = sorted(costs)[-2:]
    if len(known) < 2:
        return sum(costs[n].memory * size / n for n in known)
    (a, low), (b, high) = ((n, costs[n].memory) for n in known)
    return high + max(0.0, (high - low) / (b - a)) * (size - b)


def measure(call: Callable[[int], object], device: torch.device) -> Measure:
    """Return a `Measure` that runs `call(examples)` on `device`.

    The random state of torch is as before after every run. A call that goes over the limit is cut off: on
    the CPU at the first tensor above it, on CUDA by the allocator's own limit, set for the run. What a CPU
    kernel takes for itself inside of one operation is not counted.
    """

    def run(examples: int, limit: int) -> Cost | None:
        cuda = device.type == "cuda"
        with torch.random.fork_rng([device] if cuda else []):
            memory: int | None = None
            for _ in range(2 if examples <= FROM else 1):  # the first call of an engine may check itself
                memory = (_memory_on_cuda if cuda else _memory_on_cpu)(call, examples, device, limit)
                if memory is None:
                    return None
            assert memory is not None
            times: list[float] = []
            while len(times) < 2 or (len(times) < REPEATS and sum(times) < ENOUGH):
                began = time.perf_counter()
                call(examples)
                if cuda:
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - began)
        return Cost(memory, min(times))

    return run


def _memory_on_cpu(
    call: Callable[[int], object], examples: int, device: torch.device, limit: int
) -> int | None:
    counter = LiveBytes(limit)
    let_go()  # what an earlier call left would not be counted
    try:
        with counter:
            call(examples)
    except Exception:
        if not counter.over:
            raise
    return None if counter.over else counter.peak


def _memory_on_cuda(
    call: Callable[[int], object], examples: int, device: torch.device, limit: int
) -> int | None:
    total = torch.cuda.get_device_properties(device).total_memory
    share = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    allowed = (torch.cuda.memory_reserved(device) + limit) / total
    torch.cuda.reset_peak_memory_stats(device)
    try:
        torch.cuda.set_per_process_memory_fraction(min(share, allowed), device)
        call(examples)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.set_per_process_memory_fraction(share, device)
        torch.cuda.empty_cache()


class OverLimit(Exception):
    """The call has more memory in use than it may."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that come to life within the block, and the most alive at once.

    Attributes:
        now: bytes alive.
        peak: the most so far.
        over: whether `limit` was exceeded; the operation that did so raised `OverLimit`.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.over = False
        self._limit = limit
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._see(value, made_here=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._see(value, made_here=True)
        if self.now > self._limit:
            self.over = True
            raise OverLimit
        return result

    def _see(self, value: object, made_here: bool) -> None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made_here else 0
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size
