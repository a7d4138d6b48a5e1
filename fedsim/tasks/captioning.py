"""What a picture shows, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data import byte_pairs
from fedsim.data.targets import BEGIN, END, IGNORED, PADDING, Targets
from fedsim.headline import Metric
from fedsim.models.captioner import Captioner
from fedsim.tasks import TASKS
from fedsim.tasks.base import Means, Task
from fedsim.tasks.language_modelling import LanguageModelling, token_losses


@TASKS.register("captioning")
@dataclass(frozen=True)
class Captioning(LanguageModelling):
    """A caption token by token, each from the picture and the tokens before (Sander et al. 2024).

    The unit of privacy is a picture with its caption. Its loss is the mean cross entropy over the tokens of
    its own caption, the end among them; -100 in a target counts nowhere, and an empty caption has loss 0 and
    gradient 0, so that it adds nothing to a sum. The model is called with `images` and with `tokens`: the
    begin, then the caption but for its last place.

    "perplexity" is exp of the mean cross entropy, "token_accuracy" the share of tokens that the model would
    say; both are over all tokens of all captions, and an empty one changes neither.
    """

    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("perplexity", higher_is_better=False),
        Metric("token_accuracy", "%"),
    )

    def shown(self, inputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """See `Task.shown`."""
        begin = torch.full_like(targets[:, :1], BEGIN)
        before = torch.cat([begin, targets[:, :-1]], 1)
        return {"images": inputs, "tokens": torch.where(before == IGNORED, PADDING, before)}

    @torch.no_grad()
    def answered(self, model: nn.Module, inputs: Tensor, blank: Tensor) -> Tensor:
        """See `Task.answered`: each place gets the most likely token after those before it; after its end a
        caption is padding."""
        said = torch.full_like(blank, IGNORED)
        done = torch.zeros(len(blank), dtype=torch.bool, device=blank.device)
        encoded = model.encode(inputs) if isinstance(model, Captioner) else inputs  # once
        logits = []
        for place in range(blank.shape[1]):
            shown = self.shown(inputs, said)
            if isinstance(model, Captioner):
                outputs = model.decode(encoded, shown["tokens"][:, : place + 1])[:, place]
            else:
                outputs = model(**shown)[:, place]
            padding = torch.full_like(outputs, -math.inf)
            padding[:, PADDING] = 0.0
            logits.append(torch.where(done[:, None], padding, outputs))
            said[:, place] = logits[-1].argmax(1)
            done |= said[:, place] == END
        return torch.stack(logits, 1)

    speaks: ClassVar[bool] = True

    def in_words(self, answered: Tensor, declared: Targets) -> list[str]:
        """See `Task.in_words`: captions; tokens without names are numbers."""
        return self.targets_in_words(answered.argmax(2).numpy(), declared)

    def targets_in_words(self, targets: NDArray[Any], declared: Targets) -> list[str]:
        """See `Task.targets_in_words`."""
        named = declared.names or tuple(map(str, range(declared.size)))
        return [byte_pairs.words(row, named) for row in targets.tolist()]

    def measures(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Nothing: its metrics are over tokens, of which captions have different numbers."""
        return {}

    def meter(self) -> WithTokens:
        """See `Task.meter`."""
        return WithTokens(self)

    def noticed(self, targets: NDArray[Any]) -> dict[str, int]:
        """See `Task.noticed`: a caption whose last place is taken by another token than the end was cut."""
        last = targets[:, -1]
        return {
            "empty captions": int((targets == IGNORED).all(1).sum()),
            "captions cut": int(((last != IGNORED) & (last != END)).sum()),
        }


class WithTokens(Means):
    """Means over examples, and what is over all tokens that count."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._totals = torch.zeros(3, dtype=torch.float64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """See `Meter`."""
        super().add(outputs, targets)
        counted = targets != IGNORED
        right = (outputs.argmax(2) == targets) & counted & torch.isfinite(outputs).all(2)
        found = (token_losses(outputs, targets), right, counted)
        self._totals = self._totals.to(outputs.device) + torch.stack([part.double().sum() for part in found])

    def result(self) -> dict[str, float]:
        """See `Meter`; NaN where no caption has a token."""
        lost, right, counted = self._totals.tolist()
        if not counted:
            return {"perplexity": math.nan, "token_accuracy": math.nan, **super().result()}
        mean = lost / counted
        perplexity = math.exp(mean) if mean < 700.0 else math.inf
        return {"perplexity": perplexity, "token_accuracy": right / counted, **super().result()}
