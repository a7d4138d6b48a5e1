"""How an epsilon is computed from what was released, one way a file."""

from __future__ import annotations

from fedsim.accountants.base import Accountant
from fedsim.registry import Registry

__all__ = ["ACCOUNTANTS", "Accountant"]

ACCOUNTANTS: Registry[Accountant] = Registry("privacy.accountant", "fedsim.accountants", Accountant)
