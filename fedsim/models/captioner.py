"""A captioner: what a picture shows, token by token; its encoder is what is kept (Sander et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import validate
from fedsim.data.targets import END
from fedsim.models.cnn import image_shape
from fedsim.models.initialise import fan_in_truncated_normal_
from fedsim.models.vit import Block, check_patch, patches
from fedsim.validate import InputError


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of the encoder; width and heads of the decoder."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_heads: int


SIZES: dict[str, Size] = {
    "pico": Size(64, 4, 4, 64, 4),  # ours, for tests
    "nano": Size(192, 12, 6, 192, 6),
    "tiny": Size(384, 12, 6, 384, 6),
    "small": Size(576, 12, 12, 576, 12),
    "base": Size(768, 12, 12, 768, 12),
    "large": Size(1024, 24, 16, 768, 12),
}


@dataclass(frozen=True)
class CaptionerOptions:
    """Options of `Captioner`.

    Attributes:
        size: pico (for tests), nano, tiny, small, base or large, as the authors have them.
        patch: edge of the square patches in pixels; must divide both edges of the picture.
        decoder_depth: number of the decoder's blocks, each with attention to the picture.
        places: tokens a caption can have, its end among them.
    """

    size: str = "nano"
    patch: int = 16
    decoder_depth: int = 6
    places: int = 40


class _CaptionBlock(nn.Module):
    """Attention to the tokens before, attention to the picture, and a two-layer network of four times the
    width, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.cross_out = nn.Linear(width, width, bias=False)
        self.norm3 = nn.LayerNorm(width, bias=False)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, tokens: Tensor, picture: Tensor) -> Tensor:
        query, key, value = self._heads(self.query_key_value(self.norm1(tokens)), 3)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        tokens = tokens + self.out(self._joined(mixed))
        (query,) = self._heads(self.query(self.norm2(tokens)), 1)
        key, value = self._heads(self.key_value(picture), 2)
        seen = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.cross_out(self._joined(seen))
        return tokens + self.narrow(F.gelu(self.widen(self.norm3(tokens))))

    def _heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Cut (n, places, parts * width) into `parts` of (n, heads, places, width of a head)."""
        rows, places, _ = packed.shape
        return packed.reshape(rows, places, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _joined(self, heads: Tensor) -> Tensor:
        rows, _, places, _ = heads.shape
        return heads.transpose(1, 2).reshape(rows, places, -1)


class Captioner(nn.Module):
    """The captioner of DP-Cap (Sander et al. 2024, arXiv 2403.02506): a vision transformer, and a decoder
    whose tokens look at the ones before and at the picture. Called with `images` and `tokens`.

    No biases, pre-norm blocks, fixed positions of sines and cosines, as the authors have them. The table of
    the tokens that are read and the layer that says the next one are apart, as theirs are: tied, each
    example's gradient of the table would have to be formed, tokens times width numbers of it, because
    reading and saying meet in its entries. The encoder has no class token: features of a picture are means
    over its places (`features`).

    Weights from a truncated normal of variance 1 / fan in, token vectors from N(0, 1), norms 1.

    Raises:
        InputError: an option out of range, or data that are no pictures.
    """

    positions: Tensor
    picture_positions: Tensor
    token_positions: Tensor

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: CaptionerOptions) -> None:
        super().__init__()
        validate.one_of(options.size, SIZES, "model.options.size")
        for name in ("patch", "decoder_depth", "places"):
            validate.positive(getattr(options, name), f"model.options.{name}")
        if outputs <= END:
            raise InputError(
                f"model.name=captioner must tell at least {END + 1} tokens apart (padding, begin and end), "
                f"but {outputs} are declared. Use data with captions, and task=captioning."
            )
        channels, height, width = image_shape(input_shape, "captioner", smallest=options.patch)
        check_patch(height, width, options.patch)
        size = SIZES[options.size]
        self.patch, self.places = options.patch, options.places
        self._grid = height // options.patch, width // options.patch
        self.embed = nn.Linear(channels * options.patch**2, size.width, bias=False)
        self.blocks = nn.ModuleList(Block(size.width, size.heads, bias=False) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.bridge = nn.Linear(size.width, size.decoder_width, bias=False)
        self.vectors = nn.Embedding(outputs, size.decoder_width)
        self.decoder = nn.ModuleList(
            _CaptionBlock(size.decoder_width, size.decoder_heads) for _ in range(options.decoder_depth)
        )
        self.last_norm = nn.LayerNorm(size.decoder_width, bias=False)
        self.head = nn.Linear(size.decoder_width, outputs, bias=False)
        places = self._grid[0] * self._grid[1]
        for name, count, long in (
            ("positions", places, size.width),
            ("picture_positions", places, size.decoder_width),
            ("token_positions", options.places, size.decoder_width),
        ):  # follow from the options, so that they are not among what is sent or saved
            self.register_buffer(name, torch.empty(1, count, long), persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """Draw the weights and compute the positions."""
        for name, parameter in self.named_parameters():
            if name == "vectors.weight":
                nn.init.normal_(parameter, generator=generator)
            elif parameter.dim() > 1:
                fan_in_truncated_normal_(parameter, generator)
            else:
                nn.init.ones_(parameter)
        for buffer in (self.positions, self.picture_positions):
            buffer[0] = waves_of_places(self._grid, buffer.shape[2])
        self.token_positions[0] = waves(torch.arange(self.places), self.token_positions.shape[2])

    def encode(self, images: Tensor) -> Tensor:
        """Map pictures (n, channels, height, width) to what is at each place, (n, places, width)."""
        tokens = self.embed(patches(images, self.patch)) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def features(self, images: Tensor) -> Tensor:
        """Map pictures (n, channels, height, width) to one vector each, (n, width)."""
        return self.encode(images).mean(1)

    def decode(self, encoded: Tensor, tokens: Tensor) -> Tensor:
        """Map what `encode` gave and the tokens so far (n, T) int64, the begin first, to logits of the token
        after each, (n, T, outputs).

        Raises:
            InputError: T is above `places`.
        """
        if tokens.shape[1] > self.places:
            raise InputError(
                f"model.options.places must be at least the {tokens.shape[1]} tokens that captions have, got "
                f"{self.places}. Raise it, or lower data.options.places."
            )
        picture = self.bridge(encoded) + self.picture_positions
        found = self.vectors(tokens) + self.token_positions[:, : tokens.shape[1]]
        for block in self.decoder:
            found = block(found, picture)
        return self.head(self.last_norm(found))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Map (n, channels, height, width) and (n, T) int64 to logits (n, T, outputs)."""
        return self.decode(self.encode(images), tokens)


def waves(places: Tensor, width: int) -> Tensor:
    """Return sines and cosines of places (n,), (n, width) (Vaswani et al. 2017, s. 3.5); width is even."""
    half = width // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
    angles = places.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def waves_of_places(grid: tuple[int, int], width: int) -> Tensor:
    """Return `waves` of the row and of the column of each place of a grid (high, wide), (high * wide, width);
    width is a multiple of 4."""
    high, wide = grid
    down = waves(torch.arange(high).repeat_interleave(wide), width // 2)
    return torch.cat([down, waves(torch.arange(wide).repeat(high), width // 2)], 1)
