"""How examples are spread over holders, a few schemes a file."""

from __future__ import annotations

from fedsim.partitions.base import Function, Material, Scheme
from fedsim.registry import Registry

__all__ = ["PARTITIONS", "Material", "Scheme"]

PARTITIONS: Registry[Scheme] = Registry(
    "federation.partition", "fedsim.partitions", Scheme, function=Function
)
