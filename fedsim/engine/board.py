"""A run in TensorBoard: what is asked first stands first, in its unit, with a sentence that says what it is.

Tags are GROUP/TITLE. What may be published is in the groups "headline" and "public"; all others are called
sensitive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.engine.metrics import of_kind
from fedsim.headline import Metric
from fedsim.types import Sample, StepRecord
from fedsim.visibility import Public, Sensitive

Image = np.ndarray[Any, Any]
_GROUPS: dict[type[Any], str] = {Public: "public", Sensitive: "sensitive"}
_SECONDS = "seconds/"


@dataclass(frozen=True)
class Card:
    """How one number is shown.

    Attributes:
        title: what it is called, with its unit.
        about: what it says, in a sentence.
        first: among those that are asked first.
        scale: what a value is multiplied by to be in the unit.
    """

    title: str
    about: str = ""
    first: bool = False
    scale: float = 1.0

    def tag(self, kind: type[Any]) -> str:
        """Return group and title, for a number that may be published or not."""
        group = _GROUPS[kind]
        if self.first:
            group = "headline" if kind is Public else "headline, sensitive"
        return f"{group}/{self.title}"


CARDS = {
    "epsilon": Card("epsilon", "Spent so far, for the run's unit of privacy at its delta.", first=True),
    "loss": Card("loss", "Mean loss of the released model over the evaluation split.", first=True),
    "noise_to_signal": Card(
        "noise to signal",
        "Expected length of the step's noise over that of the exact sum it hides. Above 1 a step is mostly "
        "noise; what counts is that noise averages out over steps and the signal does not.",
        first=True,
    ),
    "train_loss": Card("training loss", "Mean over the step's examples, before the update.", first=True),
    "n_delta": Card(
        "N x delta", "Number of units times delta: how many may be given away whole. Keep it below 1."
    ),
    "learning_rate": Card("learning rate", "Of this step, by the schedule."),
    "noise_std_of_mean": Card(
        "noise of the mean (standard deviation)", "Of every entry of the noisy sum over the expected batch."
    ),
    "realised_batch_size": Card("examples drawn", "Examples that took part; a function of the private draw."),
    "sum_norm": Card("length of the sum", "L2 norm of the exact sum of clipped contributions."),
    "clip_fraction": Card(
        "clipped (%)", "Share of contributions that were longer than the clip norm.", scale=100.0
    ),
    "mean_gradient_norm": Card("mean length of a gradient", "Of one example, before clipping."),
    "non_finite_gradients": Card("gradients that are not finite", "Each adds zero to the sum."),
    "undecodable": Card("pictures that cannot be read", "Each adds zero to the sum."),
    "gradient_norm": Card("lengths of gradients", "Of single examples, before clipping."),
}


class TensorBoard:
    """Event files under `folder`.

    `headline` is what models are judged by; `timeless` files say that step s was s seconds after the epoch:
    real times follow the realised batches.
    """

    def __init__(self, folder: Path, completed: int, headline: Metric, *, timeless: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports TensorBoard: seconds

        self._writer = SummaryWriter(str(folder), purge_step=completed + 1)
        self._headline = headline
        self._timeless = timeless
        self._step = completed
        self._tags: dict[str, str] = {}

    @property
    def _walltime(self) -> float | None:
        return float(self._step) if self._timeless else None

    def write(self, record: StepRecord) -> None:
        """See `fedsim.engine.metrics.Writer`."""
        self._step = record.step
        for kind in (Public, Sensitive):
            for name, value in of_kind(kind, record.numbers).items():
                if value is not None:
                    self._scalar(name, value, kind)
        for name, histogram in record.histograms.items():
            self._histogram(self._card(name).tag(type(histogram)), *histogram.value)
        if record.samples is not None:
            self._samples(f"{_GROUPS[type(record.samples)]}/samples", record.samples.value)

    def _samples(self, tag: str, samples: Sequence[Sample]) -> None:
        """Add the pictures, and one table of what is said of each."""
        for number, sample in enumerate(samples):
            image = sample.image.transpose(2, 0, 1)
            self._writer.add_image(f"{tag}/{number}", image, self._step, self._walltime)
        lines = [f"| {n} | {_cell(sample.said)} | {_cell(sample.own)} |" for n, sample in enumerate(samples)]
        table = "\n".join(["| picture | said | caption it has |", "|---|---|---|", *lines])
        self._writer.add_text(tag, table, self._step, self._walltime)

    def _card(self, name: str) -> Card:
        if name == self._headline.name:
            better = "Higher" if self._headline.higher_is_better else "Lower"
            about = f"Of the released model, over the evaluation split. {better} is better."
            return Card(self._headline.label, about, first=True, scale=self._headline.scale)
        return CARDS.get(name, Card(name))

    def _scalar(self, name: str, value: float, kind: type[Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        card = self._card(name)
        tag = card.tag(kind)
        if name.startswith(_SECONDS):
            tag = f"{_GROUPS[kind]} seconds of a step/{name.removeprefix(_SECONDS)}"
        self._tags[name] = tag
        about = SummaryMetadata(
            display_name=tag,
            summary_description=card.about,
            plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
        )
        shown = Summary.Value(tag=tag, simple_value=value * card.scale, metadata=about)
        writer = self._writer._get_file_writer()  # the public calls take no description
        writer.add_summary(Summary(value=[shown]), self._step, self._walltime)

    def _histogram(self, tag: str, edges: Sequence[float], counts: Sequence[float]) -> None:
        """Add the buckets from the first that is filled to the last."""
        filled = np.flatnonzero(counts)
        if not len(filled):
            return
        first, last = int(filled[0]), int(filled[-1])
        edges, counts = edges[first : last + 2], counts[first : last + 1]
        middles = np.sqrt(np.asarray(edges[:-1]) * np.asarray(edges[1:]))
        weights = np.asarray(counts)
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(weights.sum()),
            sum=float((middles * weights).sum()),
            sum_squares=float((middles**2 * weights).sum()),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=self._step,
            walltime=self._walltime,
        )

    def image(self, name: str, image: Public[Image] | Sensitive[Image]) -> None:
        """Add one uint8 image of shape (3, H, W)."""
        self._writer.add_image(f"{_GROUPS[type(image)]}/{name}", image.value, 0, self._walltime)

    def hparams(self, settings: Mapping[str, Any]) -> None:
        """Add the run to the HParams tab, with the last epsilon, score and loss beside its settings; not if
        timeless: it says when it ended."""
        if self._timeless:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        names = ("epsilon", self._headline.name, "loss")
        tags = [self._tags[name] for name in names if name in self._tags]
        for summary in hparams(plain, dict.fromkeys(tags, 0.0)):  # shows the last values of these tags
            self._writer._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """See `fedsim.engine.metrics.Writer`."""
        self._writer.close()


def _cell(words: str) -> str:
    """Return words as they stand in a cell of a Markdown table, whatever is in them."""
    return re.sub(r"([^\w\s])", r"\\\1", " ".join(words.split())) or "-"
