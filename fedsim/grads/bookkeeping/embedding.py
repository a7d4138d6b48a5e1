"""Embedding tables: gradients of repeated ids are added before the norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.grads.bookkeeping.mode import Rule, Watch
from fedsim.grads.bookkeeping.precision import widen
from fedsim.grads.bookkeeping.tape import Tape, Unsupported, Use
from fedsim.grads.norms import upper_squared_norms


class EmbeddingUse(Use):
    """Use of a table (V, d) with ids (B, ...): one row for each (example, id) that occurs.

    Rows are sorted by example and id. There are as many as ids; those of an id that occurs again are zero.
    """

    def __init__(self, tape: Tape, weight: Tensor, ids: Tensor, padding: int | None) -> None:
        super().__init__(tape, weight)
        self._ids = ids
        self._padding = padding

    def fill(self, gradient: Tensor) -> None:
        """Take the output gradient (B, ..., d)."""
        count, size = self.tape.examples, self.weight.shape[0]
        ids = self._ids.reshape(count, -1)
        keys = ids + size * torch.arange(count, device=ids.device).unsqueeze(1)
        keys, order = keys.flatten().sort(stable=True)  # so that no one's order follows from the others
        self._example, self._id = keys // size, keys % size
        gradient = widen(gradient).reshape(-1, self.weight.shape[1])[order]
        if self._padding is not None:
            gradient = gradient.masked_fill((self._id == self._padding).unsqueeze(1), 0.0)
        # Each run of equal keys is added up in its first row: how many runs there are is not asked of a GPU.
        begins = keys != keys.roll(1)
        begins[:1].fill_(True)
        rows = torch.arange(len(keys), device=ids.device)
        first = rows.masked_fill_(~begins, 0).cummax(0).values
        self._sums = torch.zeros_like(gradient).index_add_(0, first, gradient)
        self.tape.arrived(self)

    def squares(self) -> Tensor:
        """See `Use.squares`."""
        blank = torch.zeros_like(self.tape.total[0])
        return blank.index_add_(0, self._example, upper_squared_norms(self._sums))

    def rows(self, low: int, high: int) -> Tensor:
        """See `Use.rows`."""
        each = len(self._sums) // self.tape.examples
        own = slice(low * each, high * each)
        places = (self._example[own] - low) * self.weight.shape[0] + self._id[own]
        result = self._sums.new_zeros(((high - low) * self.weight.shape[0], self.weight.shape[1]))
        return result.index_add_(0, places, self._sums[own]).view(-1, *self.weight.shape)

    def weighted(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Use.weighted`."""
        scaled = self._sums * coefficients.to(self._sums.dtype)[self._example].unsqueeze(1)
        return self._sums.new_zeros(self.weight.shape).index_add_(0, self._id, scaled)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, use: EmbeddingUse) -> Tensor:
        ctx.use = use
        return F.embedding(ids, use.weight.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.use.fill(gradient)
        return None, None, None


def embedding(
    watch: Watch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rule of `F.embedding`."""
    if max_norm is not None or scale_grad_by_freq:
        raise Unsupported("an embedding with max_norm or scale_grad_by_freq")
    if padding_idx is not None:
        padding_idx %= weight.shape[0]
    return _looked_up(watch, input, weight, padding_idx)


def getitem(watch: Watch, func: Any, weight: Tensor, index: Any) -> Tensor:
    """Rule of `table[ids]`; other indexing goes to the fallback."""
    by_ids = isinstance(index, Tensor) and index.dtype == torch.int64 and watch.is_rows(index)
    if by_ids and watch.is_weight(weight) and weight.dim() == 2:
        # Negative ids count from the end, which a table's rule does not know.
        return _looked_up(watch, torch.where(index < 0, index + len(weight), index), weight, None)
    return watch.fallback(func, weight, index)


def _looked_up(watch: Watch, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
    if not watch.is_rows(ids):
        raise Unsupported("an embedding takes a table computed from examples")
    tape, level = watch.tape, watch.level
    with level:
        rows = level.lower(ids)
        result = _Embedding.apply(tape.anchor, rows, tape.use(EmbeddingUse(tape, weight, rows, padding)))
    return level.lift(result)


RULES: dict[Any, Rule] = {F.embedding: embedding, Tensor.__getitem__: getitem}
