"""A picture of who holds what: labels by holder as a heat map, and the sizes of the holders.

The picture is a function of the private labels: sensitive, for simulation and for the data's owner.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedsim.validate import InputError

MAX_COLUMNS = 600  # about the width of the heat map in pixels


def figure(label_counts: NDArray[np.int64]) -> Figure:
    """Draw label counts of holders.

    The heat map shows each holder's label shares, one column a holder. Holders are ordered by their most
    frequent label, so that where there are more holders than columns of pixels, the neighbours averaged into
    one column look alike and a skew stays visible. Below are the sizes, largest first, on a log scale.

    Args:
        label_counts: (holders, classes) int64, as `Partition.label_counts` returns.

    Returns:
        A figure on the Agg canvas; pyplot and its global state are not involved.

    Raises:
        InputError: not a matrix of non-negative counts, or a holder without examples.
    """
    counts = np.asarray(label_counts)
    if counts.ndim != 2 or not counts.size or counts.min() < 0 or not counts.sum(axis=1).all():
        raise InputError(
            "label_counts must be (holders, classes) counts with at least one example per holder, "
            f"got shape {counts.shape}."
        )
    sizes = counts.sum(axis=1)
    share = counts / sizes[:, None]
    share = share[np.lexsort((-share.max(axis=1), share.argmax(axis=1)))]
    holders, classes = counts.shape
    if holders > MAX_COLUMNS:
        edges = np.arange(MAX_COLUMNS) * holders // MAX_COLUMNS
        share = np.add.reduceat(share, edges) / np.diff(edges, append=holders)[:, None]

    picture = Figure(figsize=(8.0, 5.0), dpi=100)
    FigureCanvasAgg(picture)
    # Places by hand: to fit them costs as much as all the drawing.
    map_axes: Any = picture.add_axes((0.08, 0.43, 0.76, 0.50))
    bar_axes: Any = picture.add_axes((0.86, 0.43, 0.02, 0.50))
    size_axes: Any = picture.add_axes((0.08, 0.11, 0.76, 0.19))
    image = map_axes.imshow(
        share.T,
        aspect="auto",
        origin="lower",
        vmin=0.0,
        vmax=1.0,
        cmap="viridis",
        interpolation="nearest",
        extent=(0.5, holders + 0.5, -0.5, classes - 0.5),
    )
    picture.colorbar(image, cax=bar_axes, label="share of the holder's examples")
    map_axes.set(title=f"{holders:,} holders, {int(sizes.sum()):,} examples", ylabel="label")
    map_axes.set(xlabel="holders, ordered by their most frequent label")
    size_axes.stairs(np.sort(sizes)[::-1], np.arange(holders + 1) + 0.5, baseline=0.5, fill=True)
    size_axes.set(xlabel="holders, largest first", ylabel="examples", yscale="log", ylim=(0.5, None))
    for axis in (map_axes.xaxis, map_axes.yaxis, size_axes.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    size_axes.set_xlim(0.5, holders + 0.5)
    return picture


def as_image(picture: Figure) -> NDArray[np.uint8]:
    """Render a figure to (3, H, W) uint8, the layout TensorBoard's `add_image` takes."""
    canvas = picture.canvas
    if not isinstance(canvas, FigureCanvasAgg):
        canvas = FigureCanvasAgg(picture)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    return np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))
