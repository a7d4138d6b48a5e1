"""What computes: device, threads, memory, and the settings of the gradient engine."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from fedsim import validate
from fedsim.config import Config, EngineConfig
from fedsim.grads.bookkeeping import Options
from fedsim.grads.per_example import engine_of
from fedsim.validate import InputError

_log = logging.getLogger(__name__)
SMALL = (
    100_000  # parameters; for less, other threads take longer to wake, or to be given a core, than to work
)
SHARE = 0.5  # of free memory, for a physical batch; the rest is for what is not counted, and for others
CUDA_CONTEXT = 600 * 2**20  # bytes a process takes on a GPU before its first tensor, with torch's libraries
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
    """Return the device a node computes on; one of CUDA has its index.

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
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise InputError(
            f"engine.device is {name!r}, but this process sees {torch.cuda.device_count()} CUDA devices. "
            "Use engine.device=auto or cpu; in Flower's simulation also set engine.gpus_per_node."
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"engine.device must be auto, cpu or cuda[:N], got {name!r}.")
    return device


def evaluation_device(engine: EngineConfig) -> torch.device:
    """Return where the server evaluates: on a GPU if it sees one, unless `engine.device` says cpu."""
    if engine.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    seen = engine.device.startswith("cuda:") and int(engine.device[5:]) < torch.cuda.device_count()
    return pick_device(engine.device if seen else "auto")


def check_simulation(config: Config) -> None:
    """Refuse what nodes of Flower's simulation cannot have, and warn where a GPU would stand idle by them.

    A node there sees the GPUs it reserves (`engine.gpus_per_node`), numbered from 0, and no other.

    Raises:
        InputError: says which of `engine.device` and `engine.gpus_per_node` to change.
    """
    engine, here = config.engine, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if engine.device.startswith("cuda") and not engine.gpus_per_node:
        validate.conflicts(
            f"engine.device is {engine.device}, but nodes of a simulation reserve no GPU and see none.",
            "Set engine.gpus_per_node, to a share such as 0.5 where nodes shall have one together.",
        )
    if engine.device.startswith("cuda:") and int(engine.device[5:]) >= max(1, int(engine.gpus_per_node)):
        validate.conflicts(
            f"engine.device is {engine.device}, but a node of Flower's simulation sees the GPUs it reserves, "
            f"numbered from 0, and engine.gpus_per_node is {engine.gpus_per_node:g}.",
            "Use engine.device=auto or cuda.",
        )
    if engine.gpus_per_node > here:
        validate.conflicts(
            f"engine.gpus_per_node is {engine.gpus_per_node:g}, but this machine has {here} CUDA devices: "
            "nodes would wait for ever.",
            "Use engine.gpus_per_node=0.",
        )
    if here and engine.device == "auto" and not engine.gpus_per_node:
        _log.warning(
            "the nodes train on the CPU while %d CUDA devices stand idle: engine.gpus_per_node is 0. Set it, "
            "to a share such as %g where all nodes shall have one together, or engine.device=cpu.",
            here,
            1 / config.federation.nodes,
        )


def make_deterministic(device: torch.device, wanted: bool) -> None:
    """Let this process repeat its CUDA results bit for bit, or let it be faster; nothing changes on the CPU.

    Kernels that add in any order (atomics) are then replaced, or refused by torch in its own words.
    """
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(wanted)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted


def threads_of(engine: EngineConfig, model: nn.Module) -> int | None:
    """Return `engine.threads`; where that is None, 1 for a small model and None, the default, otherwise."""
    if engine.threads is None and sum(p.numel() for p in model.parameters()) < SMALL:
        return 1
    return engine.threads


@functools.cache
def _default_threads() -> int:
    """What torch chose in this process: all visible cores, or what its environment says."""
    return torch.get_num_threads()


def set_threads(count: int | None) -> None:
    """Set torch's intra-op threads for this process; None is what it had before the first call."""
    default = _default_threads()  # asked first
    wanted = default if count is None else count
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


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
    sharers = _sharers(engine.gpus_per_node)
    return Options(
        budget,
        channels_last=last,
        precision=engine.precision,
        sharers=sharers,
        cuda_graphs=engine.cuda_graphs,
    )


def _sharers(gpus_per_node: float) -> int:
    """How many nodes of Flower's simulation may compute on one GPU at the same time."""
    return max(1, int(1 / gpus_per_node + 1e-6)) if gpus_per_node else 1


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


def free_memory(device: torch.device, processes: int = 0) -> int:
    """Return the bytes that are free on a device: for the CPU of the machine, or of the container if less.

    Args:
        processes: that will still start to use the device; on CUDA each takes memory for its own context.
    """
    if device.type == "cuda":
        return max(0, int(torch.cuda.mem_get_info(device)[0]) - processes * CUDA_CONTEXT)
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
        return min(asked, _sharers(gpus))
    return asked
