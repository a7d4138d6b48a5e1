"""What computes: device, threads, memory, and the settings of the gradient engine."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import torch

from fedsim import validate
from fedsim.config import Config, EngineConfig
from fedsim.grads.bookkeeping import Options
from fedsim.grads.per_example import engine_of
from fedsim.validate import InputError

SHARE = 0.5  # of free memory, for a physical batch; the rest is for what is not counted, and for others
_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
# A container's limit and use, cgroup version 2 and 1: the system's own figures do not show them.
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def pick_device(name: str, node: int = 0) -> torch.device:
    """Return the device a node computes on.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N". Auto takes CUDA when this process sees a device: number
            `node` modulo how many it sees. CUDA_VISIBLE_DEVICES is respected; in Flower's simulation it holds
            what the node has reserved, so that the node takes its own.
        node: index of the node.

    Raises:
        InputError: the named device is not there.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", node % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"engine.device must be auto, cpu or cuda[:N], got {name!r}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"engine.device is {name!r}, but this process sees {torch.cuda.device_count()} CUDA devices. "
            "Use engine.device=auto or cpu; in Flower's simulation also set engine.gpus_per_node."
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"engine.device must be auto, cpu or cuda[:N], got {name!r}.")
    return device


def set_threads(count: int | None) -> None:
    """Set torch's intra-op threads for this process; None leaves the default (all visible cores)."""
    if count is not None and torch.get_num_threads() != count:
        torch.set_num_threads(count)


def options_of(engine: EngineConfig) -> Options:
    """Return what the bookkeeping engine is to be told.

    Raises:
        InputError: a value that is none of those allowed.
    """
    layout = engine.channels_last
    if not isinstance(layout, bool):  # YAML reads on and off as booleans
        validate.one_of(layout, ("auto", "on", "off"), "engine.channels_last")
        layout = {"on": True, "off": False}.get(layout, layout)
    budgets = {"full": None, "low": 0}
    if engine.gradient_memory in budgets:
        budget = budgets[str(engine.gradient_memory)]
    else:
        budget = parse_bytes(engine.gradient_memory, "engine.gradient_memory", "Or use full or low.")
    last = layout if isinstance(layout, bool) else None
    return Options(budget, channels_last=last, precision=engine.precision)


def check(config: Config) -> None:
    """Raise InputError unless this process has what `config.engine` asks for, and its parts fit together."""
    engine = config.engine
    options = options_of(engine)
    engine_of(engine.gradients, options)
    options.check_device(pick_device(engine.device))
    if engine.precision != "float32" and config.model.dtype != "float32":
        validate.conflicts(
            f"engine.precision={engine.precision} is for float32 models, got {config.model.dtype}.",
            "Use engine.precision=float32, or model.dtype=float32.",
        )
    if engine.memory_limit is not None:
        memory_limit(engine, 1, 1)


def parse_bytes(value: int | float | str, name: str, remedy: str = "") -> int:
    """Return a number of bytes from a whole number or from text such as "8GB", "1.5 GiB", "512MB".

    Raises:
        InputError: anything else, or nothing above zero.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)\s*", value.lower())
        found = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    else:
        found = float(value)
    if not 1 <= found < 2**63 or (not isinstance(value, str) and found != int(found)):
        raise InputError(
            f'{name} must be bytes, such as 2000000000 or "2GB", got {value!r}. {remedy}'.rstrip()
        )
    return int(found)


def memory_limit(engine: EngineConfig, free: int, sharers: int) -> int:
    """Return the bytes one node may use for a physical batch.

    Args:
        engine: its `memory_limit` is bytes for one node, or a share of what is free.
        free: bytes that are free where it computes.
        sharers: nodes that compute there at once, among which a share is divided.
    """
    wanted = SHARE if engine.memory_limit is None else engine.memory_limit
    if isinstance(wanted, float) and 0 < wanted <= 1:
        return int(wanted * free / sharers)
    return parse_bytes(wanted, "engine.memory_limit", "Or give a share of the free memory, up to 1.0.")


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device: for the CPU of the machine, or of the container if less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for limit, used in _CONTAINER:
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            free = min(free, max(0, int(text) - int(Path(used).read_text())))
    return free


def nodes_at_once(config: Config, device: torch.device, parallel: bool) -> int:
    """Return how many nodes compute at the same time on one device or, for the CPU, on this machine.

    Args:
        config: the run.
        device: one of those they compute on.
        parallel: whether nodes are processes of their own; otherwise one answers after the other.
    """
    if not parallel:
        return 1
    federation, gpus = config.federation, config.engine.gpus_per_node
    asked = min(federation.nodes, federation.nodes_per_wave or federation.nodes)
    if device.type == "cuda" and gpus > 0:
        return min(asked, max(1, int(1 / gpus)))
    return asked
