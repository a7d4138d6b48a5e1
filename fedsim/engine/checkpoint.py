"""One file that holds everything a run needs to go on: atomic to write, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fedsim.validate import InputError

KEEP = 2  # the newest one and the one before it


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is either the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of the moment after `step` updates; keep the newest KEEP.

    Args:
        folder: where checkpoints live; created when missing.
        step: completed server updates.
        tensors: named tensors, any device.
        state: JSON-able rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    meta: dict[str, Any] = {"step": step, "state": dict(state)}
    meta["sha256"] = _digest(held, meta)
    path = folder / f"step_{step:08d}.safetensors"
    write_atomic(path, to_bytes(held, metadata={"fedsim": json.dumps(meta, sort_keys=True)}))
    for old in _all(folder)[:-KEEP]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder`, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Return (step, tensors, state) of a checkpoint.

    Raises:
        InputError: the file is damaged; names the file and what to do.
    """
    remedy = f"Delete it to resume from the checkpoint before it (in {path.parent})."
    try:
        with safe_open(path, framework="pt") as handle:
            meta = json.loads((handle.metadata() or {})["fedsim"])
            stated = meta.pop("sha256")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, AttributeError, OSError) as error:
        raise InputError(f"checkpoint {path} is damaged: {error}. {remedy}") from error
    if _digest(tensors, meta) != stated:
        raise InputError(f"checkpoint {path} is damaged: its content does not match its checksum. {remedy}")
    return int(meta["step"]), tensors, meta["state"]


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.safetensors")) if folder.is_dir() else []


def _digest(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save_model(path: Path, model: nn.Module) -> None:
    """Write a model's state dict as safetensors: what a user takes away from a run."""
    # Copies: the format has no tied weights, whose names share memory.
    held = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    write_atomic(path, to_bytes(held))


def parameters_sha256(parameters: Tensor) -> str:
    """Return the sha256 of a flat parameter vector's bytes."""
    return hashlib.sha256(parameters.detach().cpu().numpy().tobytes()).hexdigest()
