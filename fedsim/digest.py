"""Digests: 32 bytes that stand for content, SHA-256 over parts whose lengths are hashed along."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def of(parts: Iterable[bytes | memoryview]) -> bytes:
    """Return 32 bytes that depend on all parts and their order: a commitment to any part nobody can guess."""
    digest = hashlib.sha256()
    for part in parts:
        view = memoryview(part)
        digest.update(view.nbytes.to_bytes(8, "little"))
        digest.update(view)
    return digest.digest()


def of_array(values: NDArray[Any]) -> bytes:
    """Return the digest of an array's dtype, shape and entries."""
    plain = np.ascontiguousarray(values)
    head = f"{plain.dtype.str} {values.shape}".encode()
    return of([head, plain.reshape(-1).view(np.uint8).data])
