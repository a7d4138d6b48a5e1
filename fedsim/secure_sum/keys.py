"""Keys: agreement (X25519, RFC 7748), derivation (HKDF), encryption (AES-GCM), masks (AES-CTR)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from fedsim import seeds
from fedsim.secure_sum.ring import Ring
from fedsim.validate import RunError

_BLOCK = 1 << 16  # ring elements masked at once: stays in cache whatever the length


@functools.lru_cache(maxsize=1024)
def _private_key(private: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(private)  # as costly as an agreement, and used for many


@functools.lru_cache(maxsize=4096)
def public_of(private: bytes) -> bytes:
    """Return the 32-byte public key of 32 private bytes."""
    key = _private_key(private).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def agree(private: bytes, public: bytes, purpose: str, *ids: int) -> bytes:
    """Return the 32-byte key that both sides of an agreement derive for a purpose.

    Raises:
        RunError: the public key is not one (a point of small order).
    """
    return seeds.derive(_shared(private, public), purpose, *ids)


@functools.lru_cache(maxsize=20_000)
def _shared(private: bytes, public: bytes) -> bytes:
    """The agreement itself, kept from the stage that seals shares to the one that opens them."""
    try:
        return _private_key(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise RunError(f"a public key of the secure sum is not valid ({error}).") from error


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate; `key` must be used for this one message, so the nonce may be fixed."""
    return AESGCM(key).encrypt(bytes(12), text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """Return what `seal` took, None where the message or its context was changed."""
    try:
        return AESGCM(key).decrypt(bytes(12), sealed, context)
    except InvalidTag:
        return None


def add_mask(total: NDArray[Any], key: bytes, ring: Ring, *, subtract: bool = False) -> None:
    """Add (or subtract) the mask of `key`, uniform on the ring, to `total` (L,) in place."""
    per_word = 64 // ring.bits
    operation = np.subtract if subtract else np.add
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        words = seeds.words(key, start // per_word, -(-len(part) // per_word))
        operation(part, words.view(ring.dtype)[: len(part)], out=part)
