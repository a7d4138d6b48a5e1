"""Texts by the words they have, whatever their order: a vector a token, and a layer on their sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.initialise import initialise
from fedsim.validate import InputError

PADDING = 0
_POWERS = {"mean": 1.0, "root": 0.5, "sum": 0.0}


@dataclass(frozen=True)
class BagOfWordsOptions:
    """Options of `BagOfWords`.

    Attributes:
        width: of the vector a token has, before the linear layer; null: a token's vector is what it adds to
            each output, which is logistic regression on counts of words.
        pooling: what the sum of a text's n vectors is divided by: "mean": n, "root": its square root, "sum":
            nothing. Padding counts nowhere.
        zero_init: start from zeros; with a width only the linear layer does.
    """

    width: int | None = None
    pooling: str = "mean"
    zero_init: bool = True


class BagOfWords(nn.Module):
    """A linear function of the tokens a text has; token 0 is padding.

    Raises:
        InputError: an option out of range, or data that are no token ids (T,).
    """

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, options: BagOfWordsOptions, vocabulary: int | None
    ) -> None:
        super().__init__()
        validate.one_of(options.pooling, _POWERS, "model.options.pooling")
        if options.width is not None:
            validate.positive(options.width, "model.options.width")
        if vocabulary is None or len(input_shape) != 1:
            raise InputError(
                f"model.name=bag_of_words takes token ids (T,) of a vocabulary, got examples of shape "
                f"{input_shape} and vocabulary {vocabulary}. Use it with texts."
            )
        self.power, self.zero_init = _POWERS[options.pooling], options.zero_init
        self.vectors = nn.Embedding(vocabulary, outputs if options.width is None else options.width)
        self.head: nn.Linear | None = None
        if options.width is None:
            self.bias = nn.Parameter(torch.empty(outputs))
        else:
            self.head = nn.Linear(options.width, outputs)

    def reset(self, generator: torch.Generator) -> None:
        """Draw the vectors and the head, or zero what is asked to start from zeros."""
        last: nn.Module = self.vectors if self.head is None else self.head
        for part in (self.vectors, self.head):
            if part is not None and not (self.zero_init and part is last):
                initialise(part, generator)
        if self.zero_init:
            for value in last.parameters():
                nn.init.zeros_(value)
        if self.head is None:
            nn.init.zeros_(self.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, T) int64 to logits (n, outputs)."""
        # Not padding_idx: noise reaches that row of the table too, and what it holds must count nowhere.
        real = (tokens != PADDING).to(self.vectors.weight.dtype).unsqueeze(2)
        total = (self.vectors(tokens) * real).sum(1)
        pooled = total / real.sum(1).clamp(min=1.0) ** self.power
        return pooled + self.bias if self.head is None else self.head(pooled)
