"""All rows of the table."""

from __future__ import annotations

from benchmarks.layers.attention import attention
from benchmarks.layers.autograd import autograd
from benchmarks.layers.case import Case
from benchmarks.layers.convolutions import convolutions
from benchmarks.layers.dense import adaptive_softmax, dense
from benchmarks.layers.embeddings import embeddings
from benchmarks.layers.losses import losses
from benchmarks.layers.norms import norms
from benchmarks.layers.parameters import parameters
from benchmarks.layers.parametrised import parametrised
from benchmarks.layers.recurrent import recurrent
from benchmarks.layers.selections import selections
from benchmarks.layers.shapes import shapes


def layers() -> list[Case]:
    """Layers of torch.nn, and models that do something unusual."""
    return [
        *dense(), *adaptive_softmax(), *convolutions(), *norms(), *embeddings(), *recurrent(), *attention(),
        *parametrised(), *parameters(), *autograd(), *shapes(), *selections(), *losses(),
    ]  # fmt: skip


def architectures() -> list[Case]:
    """Architectures of torchvision, and of timm and transformers, which must be installed."""
    from benchmarks.layers.of_timm import of_timm
    from benchmarks.layers.of_torchvision import of_torchvision
    from benchmarks.layers.of_transformers import of_transformers

    return [*of_torchvision(), *of_timm(), *of_transformers()]
