"""Where all randomness starts: keys and generators derived from one root.

Nothing in fedsim touches a global generator. A root is an integer seed (simulation) or 32 secret bytes
(deployment); every use derives its own key from (root, purpose, ids), so a value depends on what it is
for and never on the order in which things happened, the process, or the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedsim.validate import InputError

if TYPE_CHECKING:  # torch takes longer to import than most of what is counted without it
    import torch


@dataclass(frozen=True)
class Granted:
    """What a process may know of a root it must not know: keys derived for it elsewhere, by purpose."""

    keys: Mapping[str, bytes]


Root = int | bytes | Granted
WITHHELD = -1
"""The seed of a configuration that was sent: `derive` refuses it."""


def _root_bytes(root: int | bytes) -> bytes:
    if isinstance(root, bytes):
        if len(root) != 32:
            raise InputError(f"a secret root must be 32 bytes, got {len(root)}.")
        return b"bytes" + root
    if not 0 <= root < 2**64:
        raise InputError(f"seed must be between 0 and 2**64 - 1, got {root}.")
    return b"int" + int(root).to_bytes(8, "little")


def derive(root: Root, purpose: str, *ids: int) -> bytes:
    """Return the 32-byte key for `purpose` and integer `ids` (RFC 5869 HKDF with SHA-256).

    Keys for different (purpose, ids) are computationally independent; knowing one tells nothing about
    the root or another key.

    Raises:
        InputError: a seed out of range, or a purpose for which no key was granted.
    """
    if isinstance(root, Granted):
        if ids or purpose not in root.keys:
            raise InputError(f"no key was granted for {purpose!r}, only for {', '.join(sorted(root.keys))}.")
        return root.keys[purpose]
    info = purpose.encode() + b"\0" + b"".join(int(i).to_bytes(16, "little", signed=True) for i in ids)
    return HKDF(hashes.SHA256(), 32, salt=b"fedsim", info=info).derive(_root_bytes(root))


def stream(root: Root, purpose: str, *ids: int) -> np.random.Generator:
    """Return a numpy generator (Philox) for one purpose: partitions, shuffles, small draws."""
    return generator(derive(root, purpose, *ids))


def generator(key: bytes) -> np.random.Generator:
    """Return the numpy generator (Philox) of one key."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)[:2]))


def torch_stream(root: Root, purpose: str, *ids: int) -> torch.Generator:
    """Return a CPU torch generator for one purpose (model initialisation)."""
    import torch

    seed = int.from_bytes(derive(root, purpose, *ids)[:8], "little") & (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def words(key: bytes, start: int, count: int) -> NDArray[np.uint64]:
    """Return words start .. start + count - 1 of the AES-256-CTR key stream, uint64 of shape (count,).

    Random access: word i depends on (key, i) alone, so any slice of any order gives the same words.
    Cost is that of AES on 8 bytes a word (about 1 ns with AES instructions).
    """
    first_block, offset = divmod(start, 2)
    size = 8 * (count + offset)
    counter = first_block.to_bytes(16, "big")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    out = bytearray(size + 15)
    written = encryptor.update_into(bytes(size), out)
    return np.frombuffer(out, dtype="<u8", count=written // 8)[offset:]
