"""What an encoder has learned: linear and few-shot probes on its frozen features, and captions told apart.

All of it looks at released parameters and at data sets that are public or of one's own: it costs a run's
examples no privacy. Beside the encoder stand the same architecture as it was drawn, and the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim import models, seeds, validate
from fedsim.data.examples import ArrayDataset, normalise
from fedsim.data.sources.image_files import fitted
from fedsim.models.captioner import Captioner
from fedsim.models.masked_autoencoder import MaskedAutoencoder
from fedsim.report.significance import mean_with_interval
from fedsim.run import Run
from fedsim.tasks.captioning import Captioning
from fedsim.validate import InputError

BATCH = 250
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the squared weights of a linear probe; the best on a fifth of its training examples is taken."""
FEW_DECAY = 1e-2
HELD_OUT = 5
STEPS = 200  # of L-BFGS at most

Encoder = Captioner | MaskedAutoencoder
Features = Callable[[NDArray[np.uint8]], Tensor]


def encoder_of(run: Run) -> Encoder:
    """Return a run's model, which has an encoder.

    Raises:
        InputError: it has none.
    """
    if not isinstance(run.model, Encoder):
        raise InputError(
            f"{run.folder} must hold a captioner or a masked_autoencoder, whose features can be probed, got "
            f"{run.card.model.name}."
        )
    return run.model


def captioner_of(run: Run) -> Captioner:
    """Return a run's captioner.

    Raises:
        InputError: the run has another model.
    """
    if not isinstance(run.model, Captioner):
        raise InputError(
            f"{run.folder} must hold a captioner, which says captions, got {run.card.model.name}."
        )
    return run.model


def features_of(run: Run, model: Encoder) -> Features:
    """Return a function from pictures (n, H, W, C) uint8 of any size, grey or in colour, to features (n, d),
    float64; `model` sees them as it saw those of the run."""
    _, high, wide = run.card.example_shape
    blank = run.card.blank()

    def features(images: NDArray[np.uint8]) -> Tensor:
        found = []
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                seen = brought(images[start : start + BATCH], high, wide)
                found.append(model.features(normalise(seen, blank, next(model.parameters()).dtype)).double())
        return torch.cat(found)

    return features


def brought(images: NDArray[np.uint8], high: int, wide: int) -> NDArray[np.uint8]:
    """Return pictures (n, H, W, 1 or 3) as (n, high, wide, 3)."""
    from PIL import Image

    colour = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
    if colour.shape[1:3] == (high, wide):
        return colour
    return np.stack([np.asarray(fitted(Image.fromarray(image), (high, wide))) for image in colour])


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """Return the pixels as features (n, H * W * C)."""
    return torch.from_numpy(images.reshape(len(images), -1) / 255.0)


def probes(
    run: Run,
    train: ArrayDataset,
    test: ArrayDataset,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 3,
    told: Callable[[str], None] = lambda now: None,
) -> dict[str, dict[str, Any]]:
    """Return the accuracy of linear and few-shot probes on features of the run's encoder, on those of the
    same architecture as drawn from other seeds, and on pixels.

    Args:
        run: of a model with an encoder.
        train, test: pictures with classes.
        shots: examples a class of the few-shot probes.
        draws: of the few examples, and of the encoder as drawn: seeds 0, 1, ...
        told: gets what is done next, in words.

    Returns:
        {"encoder" | "drawn" | "pixels": {"linear": [accuracy, ...], "1 shot": [...], ...}}: of the encoder
        and of pixels one linear probe, and `draws` of everything else.

    Raises:
        InputError: no encoder, or data that are no pictures with classes.
    """
    validate.positive(draws, "draws")
    for data in (train, test):
        if not data.is_image or data.declared.kind != "class":
            raise InputError(f"probes must have pictures with classes, and {data.name} has none.")
    card, shape = run.card, run.card.example_shape
    drawn = [models.build(card.model, shape, card.outputs, seed, card.vocabulary) for seed in range(draws)]
    ways: dict[str, list[Features]] = {
        "encoder": [features_of(run, encoder_of(run))],
        "drawn": [features_of(run, model.eval()) for model in drawn if isinstance(model, Encoder)],
        "pixels": [pixels],
    }
    classes = train.declared.size
    (train_images, train_labels), (test_images, test_labels) = whole(train), whole(test)
    labels = train_labels, test_labels
    found: dict[str, dict[str, Any]] = {}
    for name, several in ways.items():
        scores: dict[str, list[float]] = {}
        for number, way in enumerate(several, 1):
            told(f"probes on {name} ({number} of {len(several)})")
            own = standardised(way(train_images), way(test_images))
            scores.setdefault("linear", []).append(linear(*own, *labels, classes))
            for few in shots:
                count = draws if len(several) == 1 else 1
                first = len(scores.get(f"{few} shot", ()))
                scores.setdefault(f"{few} shot", []).extend(
                    few_shot(*own, *labels, classes, few, first + draw) for draw in range(count)
                )
        found[name] = scores
    return found


def whole(data: ArrayDataset) -> tuple[NDArray[np.uint8], Tensor]:
    """Return all pictures that can be decoded, and their classes."""
    every = slice(0, len(data.targets))
    (images, there), labels = data.read(every), data.wanted_of(every)
    if there is not None:
        images, labels = images[there], labels[there]
    return images, torch.from_numpy(np.array(labels))


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return both less the mean and over the deviation of each training feature."""
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def linear(train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor, classes: int) -> float:
    """Return the test accuracy of logistic regression, with the decay that held-out training examples choose.

    Args:
        train, test: (n, d) float64 features.
        train_labels, test_labels: (n,) classes.
        classes: number of them.
    """
    order = torch.from_numpy(seeds.stream(0, "probe").permutation(len(train)))
    held, kept = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    best = max(
        DECAYS,
        key=lambda decay: accuracy(
            fitted_head(train[kept], train_labels[kept], classes, decay), train[held], train_labels[held]
        ),
    )
    return accuracy(fitted_head(train, train_labels, classes, best), test, test_labels)


def few_shot(
    train: Tensor,
    test: Tensor,
    train_labels: Tensor,
    test_labels: Tensor,
    classes: int,
    shots: int,
    draw: int,
) -> float:
    """Return the test accuracy of logistic regression on `shots` training examples of every class.

    Raises:
        InputError: a class has fewer.
    """
    random, chosen = seeds.stream(draw, "few shots"), []
    for label in range(classes):
        own = np.flatnonzero(train_labels.numpy() == label)
        if len(own) < shots:
            raise InputError(
                f"few-shot probes (--shots) need {shots} examples a class, class {label} has {len(own)}. "
                "Ask for fewer, or set other data."
            )
        chosen.append(random.choice(own, shots, replace=False))
    rows = torch.from_numpy(np.concatenate(chosen))
    head = fitted_head(train[rows], train_labels[rows], classes, FEW_DECAY)
    return accuracy(head, test, test_labels)


def fitted_head(inputs: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """Return weights (d + 1, classes) of logistic regression, the last row the offsets: by L-BFGS, the
    minimum of the mean cross entropy and decay / 2 times the squared weights but for offsets."""
    weights = torch.zeros(inputs.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    rule = torch.optim.LBFGS([weights], max_iter=STEPS, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        rule.zero_grad()
        loss = F.cross_entropy(inputs @ weights[:-1] + weights[-1], labels)
        loss = loss + decay / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        rule.step(closure)
    return weights.detach()


def accuracy(weights: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of examples whose class has the highest score."""
    return float((torch.argmax(inputs @ weights[:-1] + weights[-1], 1) == labels).double().mean())


def told_apart(
    model: nn.Module, data: ArrayDataset, among: int = 10, examples: int = 500, seed: int = 0
) -> dict[str, float]:
    """Return how often a picture's own caption is the likeliest among several, by mean loss a token.

    Args:
        model: called with images and tokens, in eval mode.
        data: pictures with captions; empty ones are left out.
        among: captions a picture is shown with, its own one of them; the others are other pictures', with
            other words.
        examples: pictures that are looked at, the first ones; those that cannot be decoded are left out.
        seed: of the choice of the others.

    Returns:
        "right": share of pictures whose own caption has the lowest loss, where a tie is no win; "chance": 1 /
        among; "pictures": how many were looked at.

    Raises:
        InputError: fewer different captions than `among`, or no picture that can be decoded.
    """
    task, random = Captioning(), seeds.stream(seed, "captions told apart")
    targets = data.wanted_of(slice(None))
    rows = np.flatnonzero((targets != -100).any(1))
    different = np.unique(targets[rows], axis=0, return_index=True)[1]
    if len(different) < among or among < 2:
        raise InputError(f"among must be 2 .. {len(different)}, the different captions, got {among}.")
    others, right, seen = rows[different], 0, 0
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for row in rows[:examples]:
            picture, there = data.read(slice(row, row + 1))
            if there is not None:
                continue
            strangers = others[(targets[others] != targets[row]).any(1)]
            chosen = np.concatenate([[row], random.choice(strangers, among - 1, replace=False)])
            wanted = torch.from_numpy(targets[chosen])
            image = normalise(picture, data, dtype).expand(among, -1, -1, -1)
            losses = task.loss(model(**task.shown(image, wanted)), wanted)
            right += bool((losses[0] < losses[1:]).all())
            seen += 1
    if not seen:
        raise InputError("captions are told apart by their pictures, and none of these can be decoded.")
    return {"right": right / seen, "chance": 1.0 / among, "pictures": float(seen)}


def rows_of(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[tuple[str, ...]]:
    """Return the probes as lines of a table: whose features, then means ± half intervals, percent."""
    heads = list(next(iter(found.values())))
    lines: list[tuple[str, ...]] = [("features", *heads)]
    for name, scores in found.items():
        cells = []
        for head in heads:
            values = [100 * value for value in scores[head]]
            cells.append(mean_with_interval(values, 1, "%"))
        lines.append((name, *cells))
    return lines
