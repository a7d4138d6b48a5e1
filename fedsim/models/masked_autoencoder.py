"""A masked autoencoder: what is under the hidden patches of a picture (He et al. 2022), as ViP has it (Yu et
al. 2023); its encoder is what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.captioner import SIZES, waves_of_places
from fedsim.models.cnn import image_shape
from fedsim.models.initialise import fan_in_truncated_normal_
from fedsim.models.vit import Block, check_patch, patches
from fedsim.validate import InputError

PRIME = 2**31 - 1
_FINE = 2048  # steps of a unit of an input that are told apart: bytes are, whatever they are scaled by


@dataclass(frozen=True)
class MaskedAutoencoderOptions:
    """Options of `MaskedAutoencoder`.

    Attributes:
        size: of the encoder: pico (for tests), nano, tiny, small, base or large, as captioners have them.
        patch: edge of the square patches in pixels; must divide both edges of the picture.
        mask: share of the patches that is hidden.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        own_scale: whether each hidden patch is to be said less its own mean and over its own deviation.
    """

    size: str = "base"
    patch: int = 16
    mask: float = 0.75
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16
    own_scale: bool = True


class MaskedAutoencoder(nn.Module):
    """A vision transformer that sees a share of a picture's patches, and a shallow one that says the others.

    Returns what it says of the hidden patches less what they are, (n, hidden, channels * patch^2), for
    task=reconstruction. Which patches are hidden follows from the picture that it is given, by a hash of its
    pixels, so that it depends on no other example, nor on who computes it; another view of the same picture,
    such as another part of it, has others. Positions are fixed sines and cosines; there is no class token,
    and features of a picture are means over all its places (`features`).

    Weights from a truncated normal of variance 1 / fan in, the vector in the place of what is hidden from
    N(0, 0.02^2), biases 0, norms 1 and 0.

    Raises:
        InputError: an option out of range, nothing hidden or nothing seen, or data that are no pictures.
    """

    positions: Tensor
    decoder_positions: Tensor

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: MaskedAutoencoderOptions) -> None:
        super().__init__()
        validate.one_of(options.size, SIZES, "model.options.size")
        for name in ("patch", "decoder_width", "decoder_depth", "decoder_heads"):
            validate.positive(getattr(options, name), f"model.options.{name}")
        channels, height, width = image_shape(input_shape, "masked_autoencoder", smallest=options.patch)
        check_patch(height, width, options.patch)
        if options.decoder_width % 4 or options.decoder_width % options.decoder_heads:
            raise InputError(
                "model.options.decoder_width must be a multiple of 4 and of decoder_heads "
                f"({options.decoder_heads}), got {options.decoder_width}."
            )
        size = SIZES[options.size]
        self.patch, self.own_scale = options.patch, options.own_scale
        self._grid = height // options.patch, width // options.patch
        places = self._grid[0] * self._grid[1]
        self.seen = round((1.0 - options.mask) * places)
        if not 1 <= self.seen < places:
            raise InputError(
                f"model.options.mask must leave 1 .. {places - 1} of the {places} patches to be seen, got "
                f"{options.mask}, which leaves {self.seen}."
            )
        pixels = channels * options.patch**2
        self.embed = nn.Linear(pixels, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.bridge = nn.Linear(size.width, options.decoder_width)
        self.hidden = nn.Embedding(1, options.decoder_width)
        self.decoder = nn.ModuleList(
            Block(options.decoder_width, options.decoder_heads) for _ in range(options.decoder_depth)
        )
        self.last_norm = nn.LayerNorm(options.decoder_width)
        self.head = nn.Linear(options.decoder_width, pixels)
        for name, long in (("positions", size.width), ("decoder_positions", options.decoder_width)):
            self.register_buffer(name, torch.empty(places, long), persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """Draw the weights and compute the positions."""
        for name, parameter in self.named_parameters():
            if name == "hidden.weight":
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif parameter.dim() > 1:
                fan_in_truncated_normal_(parameter, generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)
        for buffer in (self.positions, self.decoder_positions):
            buffer.copy_(waves_of_places(self._grid, buffer.shape[1]))

    def encode(self, images: Tensor) -> Tensor:
        """Map pictures (n, channels, height, width), nothing hidden, to (n, places, width)."""
        return self._encoded(self.embed(patches(images, self.patch)) + self.positions)

    def features(self, images: Tensor) -> Tensor:
        """Map pictures (n, channels, height, width) to one vector each, (n, width)."""
        return self.encode(images).mean(1)

    def _encoded(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, hidden, channels * patch^2)."""
        squares = patches(images, self.patch)
        order = order_of(squares)
        seen, hidden = order[:, : self.seen], order[:, self.seen :]
        encoded = self._encoded(self.embed(_taken(squares, seen)) + self.positions[seen])
        # Seen and hidden places side by side: attention does not ask for their order, positions say it.
        shown = self.bridge(encoded) + self.decoder_positions[seen]
        blank = self.hidden(torch.zeros_like(hidden)) + self.decoder_positions[hidden]
        found = torch.cat([shown, blank], 1)
        for block in self.decoder:
            found = block(found)
        wanted = _taken(squares, hidden)
        if self.own_scale:
            spread = wanted.var(2, keepdim=True, correction=0)
            wanted = (wanted - wanted.mean(2, keepdim=True)) / (spread + 1e-6).sqrt()
        return self.head(self.last_norm(found[:, self.seen :])) - wanted


def _taken(squares: Tensor, places: Tensor) -> Tensor:
    """Return the patches (n, k, pixels) at places (n, k) of each picture."""
    return squares.gather(1, places[:, :, None].expand(-1, -1, squares.shape[2]))


def order_of(squares: Tensor) -> Tensor:
    """Return the places of each picture's patches (n, places, pixels) in an order that looks random and
    follows from its pixels alone, (n, places) int64.

    In whole numbers: no sum is rounded, so that the order is the same however pictures are put together.
    """
    steps = (squares.detach() * _FINE).round().long()
    pixel = torch.arange(1, squares.shape[2] + 1, device=squares.device)
    place = torch.arange(1, squares.shape[1] + 1, device=squares.device)
    own = (steps * (pixel * 1_103_515_245 % PRIME)).sum(2) % PRIME
    whole = (own * (place * 69_621 % PRIME) % PRIME).sum(1, keepdim=True) % PRIME
    keys = (own + place * 40_692) % PRIME
    for times in (1_583_458_089, 784_588_716):  # a round of each half of the bits into the other
        keys = (keys * times + whole) % PRIME
        keys = keys ^ (keys >> 15)
    return keys.argsort(stable=True, dim=1)
