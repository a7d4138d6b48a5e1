"""What one unit adds to the sum of a step, and its bound; one query a file."""

from __future__ import annotations

from fedsim.queries.base import Query
from fedsim.queries.statistic import Means, Part, Statistic
from fedsim.registry import Registry

__all__ = ["QUERIES", "Means", "Part", "Query", "Statistic"]

QUERIES: Registry[Query] = Registry("query.name", "fedsim.queries", Query)
