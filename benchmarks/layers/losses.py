"""Losses, outputs and targets of other forms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers.case import CLASSES, Call, Case, ids, labels, numbers


class Masked(nn.Module):
    """Token ids, a mask and numbers beside them: arrays of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.beside, self.head = nn.Embedding(9, 5), nn.Linear(3, 5), nn.Linear(5, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Logits of the mean over what the mask keeps, in a mapping."""
        kept = mask[..., None].to(numbers.dtype)
        mean = (self.embed(ids) * kept).sum(1) / kept.sum(1).clamp(min=1)
        return {"logits": self.head(torch.tanh(mean + self.beside(numbers)))}


class Mapping(nn.Module):
    """Takes the mapping itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and what they came from, as a tuple."""
        hidden = torch.tanh(self.inner(batch["left"] - batch["right"]))
        return self.head(hidden), hidden


def losses() -> Iterator[Case]:
    """Losses, outputs and targets of other forms."""
    group = "losses and batches"

    def arrays(examples: int, views: int) -> dict[str, Tensor]:
        return {
            "ids": ids(6, 9)(examples, views),
            "mask": torch.rand(examples, views, 6) > 0.4,
            "numbers": numbers(3)(examples, views),
        }

    def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
        each = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=0, reduction="none")
        return each.sum(1) / (targets != 0).sum(1).clamp(min=1)

    def boxes(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        kind = F.cross_entropy(outputs["kind"], targets["kind"], reduction="none")
        return kind + F.smooth_l1_loss(outputs["box"], targets["box"], reduction="none").sum(1)

    def distilled(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs[0], targets, reduction="none") + 0.1 * outputs[1].square().mean(1)

    yield Case(
        group,
        "named arrays, mapping out",
        Masked,
        arrays,
        loss=lambda outputs, targets: F.cross_entropy(outputs["logits"], targets, reduction="none"),
    )
    yield Case(
        group,
        "the mapping itself, tuple out",
        Mapping,
        lambda examples, views: {name: numbers(4)(examples, views) for name in ("left", "right")},
        loss=distilled,
        whole=True,
    )
    yield Case(
        group,
        "regression, targets with axes",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1)),
        numbers(2, 4, 4),
        lambda examples: torch.randn(examples, 1, 4, 4),
        lambda outputs, targets: (outputs - targets).square().flatten(1).mean(1),
        zero=("2.*",),
    )
    yield Case(
        group,
        "several labels",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)),
        numbers(5),
        lambda examples: torch.randint(0, 2, (examples, 4)).float(),
        lambda outputs, targets: F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(
            1
        ),
        zero=("2.*",),
    )
    yield Case(
        group,
        "language model, padded targets",
        lambda: nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 9)),
        ids(6, 9),
        lambda examples: torch.randint(0, 9, (examples, 6)),
        tokens,
        zero=("3.*",),
    )
    yield Case(
        group,
        "boxes and kinds, mappings",
        lambda: Call(
            lambda m, x: {"kind": m.head(torch.tanh(m.inner(x))), "box": m.box(torch.tanh(m.inner(x)))},
            inner=nn.Linear(5, 6),
            head=nn.Linear(6, CLASSES),
            box=nn.Linear(6, 4),
        ),
        numbers(5),
        lambda examples: {"kind": labels(examples), "box": torch.randn(examples, 4)},
        boxes,
        zero=("head.*", "box.*"),
    )
    yield Case(
        group,
        "a loss that mixes examples",
        lambda: nn.Linear(5, 3),
        numbers(5),
        labels,
        lambda outputs, targets: F.cross_entropy(
            outputs @ outputs.t(), torch.arange(len(outputs)), reduction="none"
        ),
        zero=(),
        views=1,
        refused=True,
    )
    yield Case(
        group,
        "a model that centres over the batch",
        lambda: Call(lambda m, x: m.inner(x - x.mean(0)), inner=nn.Linear(5, CLASSES)),
        numbers(5),
        zero=(),
        views=1,
        refused=True,
    )
