"""Trials of the bound in bfloat16 and TF32, emulated on the CPU: whole models, the ways of CPUs and of GPUs.

    python -m benchmarks.bound --reduced [--cases N] [--json FILE]

bfloat16 is the CPU's autocast, TF32 rounds what products multiply (`benchmarks.emulated`). Who shares a batch
can change bits of the others: kernels differ with its size. Half of the trials leave an example in the batch,
with weight zero, and do without the margin that is kept for this (`Options.margin`): they show that a
contribution is as long as it was measured. The others take it out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.bound.hostile import FILLS
from benchmarks.bound.judge import CLIPS, Trial, clip_of, contributions, product, scale
from benchmarks.emulated import Tf32
from fedsim import models
from fedsim.config import ModelConfig
from fedsim.grads import ClipRule, clipped_gradient_sum, gpu
from fedsim.grads.bookkeeping import Options

CASES = 5_000
PRECISIONS = ("float32", "tf32", "bfloat16")
PLACES = ("CPU", "GPU")
SHAPE = (3, 16, 16)
CLASSES = 5
MOST = 5  # examples of a batch


class BertMini(nn.Module):
    """Token ids to logits: embeddings, one layer of attention, a head. Ids and scales come from images."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 16), nn.Embedding(6, 16)
        self.norm = nn.LayerNorm(16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, ...) to (n, classes)."""
        ids = inputs.flatten(1).abs().mul(3.0).clamp(max=29.0).long()[:, :6]
        rows = self.words(ids) + self.places(torch.arange(6, device=inputs.device))
        rows = self.norm(rows) * inputs.flatten(1).abs().amax(1).view(-1, 1, 1)
        return self.head(self.layer(rows).mean(1))


def _family(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: models.build(ModelConfig(name, options), SHAPE, CLASSES, 0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _family("mlp"),
    "cnn": _family("cifar_cnn"),
    "wide resnet": _family("wide_resnet", depth=10, width=1),
    "vision transformer": _family("vit", width=48, depth=2),
    "bert": BertMini,
}


def build(name: str) -> nn.Module:
    """One of `MODELS`; no parameter is all zero: a last layer that is would hide what is behind it."""
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1)
    return model


@contextmanager
def anywhere(place: str, margin: bool) -> Iterator[None]:
    """Allow every precision, with or without the margin, on the ways of "CPU" or "GPU"."""
    with (
        mock.patch.object(Options, "check_device"),
        mock.patch.object(Options, "margin", Options.margin if margin else 1.0),
        mock.patch.object(gpu, "on", return_value=place == "GPU"),
        Tf32(),
    ):
        yield


def sums(precision: str) -> Callable[[nn.Module, Tensor, Tensor, ClipRule], Tensor]:
    """The public function in a precision."""
    options = Options(precision=precision)
    return lambda model, inputs, targets, clip: clipped_gradient_sum(
        model,
        inputs,
        targets,
        clip,
        loss=product,
        engine="bookkeeping",
        physical_batch_size=MOST * inputs.shape[1],
        options=options,
    ).sum[None]


def trial(number: int) -> Trial:
    """Draw trial `number` and judge it."""
    draw = random.Random(f"reduced {number}")
    name = list(MODELS)[number % len(MODELS)]
    precision, place = draw.choice(PRECISIONS), draw.choice(PLACES)
    kind, steep = draw.choice(list(FILLS)), draw.choice(list(FILLS))
    examples, views = draw.randint(1, MOST), draw.choice((1, 1, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        model = build(name)
        inputs = FILLS[kind](draw, (examples, views, *SHAPE))
        targets = FILLS[steep](draw, (examples, CLASSES))
        clip_name = draw.choice(CLIPS)
        clip = clip_of(clip_name, model, scale(model, inputs, targets) * 10 ** draw.uniform(-2, 0.3), draw)
        stays = draw.random() < 0.5
        way = f"{precision}, {place}, {'stays' if stays else 'goes'}"
        found = name, kind, steep, clip_name, way, examples
        try:
            with anywhere(place, margin=not stays):
                excess, longest = contributions(model, inputs, targets, clip, sums(precision), stays)
        except Exception as problem:
            return Trial(number, *found, math.inf, math.inf, f"{type(problem).__name__}: {problem}"[:200])
    return Trial(number, *found, excess, longest)
