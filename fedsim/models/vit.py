"""Small vision transformer without pooling token, for images of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import validate
from fedsim.models.cnn import image_shape
from fedsim.models.initialise import fan_in_truncated_normal_
from fedsim.validate import InputError


@dataclass(frozen=True)
class VisionTransformerOptions:
    """Options of `VisionTransformer`.

    Attributes:
        patch: edge of the square patches in pixels; must divide both edges of the image.
        width: length of a token; must be a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads of a block.
    """

    patch: int = 4
    width: int = 192
    depth: int = 12
    heads: int = 3


class Block(nn.Module):
    """Attention and a two-layer network of four times the width, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.widen = nn.Linear(width, 4 * width, bias=bias)
        self.narrow = nn.Linear(4 * width, width, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, places, width = tokens.shape
        packed = self.query_key_value(self.norm1(tokens))
        query, key, value = packed.reshape(rows, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(rows, places, width))
        return tokens + self.narrow(F.gelu(self.widen(self.norm2(tokens))))


def patches(images: Tensor, edge: int) -> Tensor:
    """Cut images (n, channels, height, width) into squares: (n, places, channels * edge^2), row by row."""
    rows, channels, height, width = images.shape
    cut = images.reshape(rows, channels, height // edge, edge, width // edge, edge)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * edge**2)


def check_patch(height: int, width: int, patch: int) -> None:
    """Refuse squares that do not fill an image.

    Raises:
        InputError: says which edge must divide which.
    """
    if height % patch or width % patch:
        raise InputError(f"model.options.patch must divide the image's {height}x{width} pixels, got {patch}.")


class VisionTransformer(nn.Module):
    """Vision transformer of Dosovitskiy et al. 2021 with global average pooling (Beyer et al. 2022).

    With the default options the width, depth and heads of ViT-Tiny (Touvron et al. 2021) on patches of 4x4:
    5.36 million parameters for 3x32x32 images and 10 classes. Pre-norm blocks, learned positions from
    N(0, 0.02^2), weights from a truncated normal of variance 1 / fan in, biases 0, norms 1 and 0.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, options: VisionTransformerOptions) -> None:
        super().__init__()
        for name in ("patch", "width", "depth", "heads"):
            validate.positive(getattr(options, name), f"model.options.{name}")
        channels, height, width = image_shape(input_shape, "vit", smallest=options.patch)
        check_patch(height, width, options.patch)
        if options.width % options.heads:
            raise InputError(
                f"model.options.width must be a multiple of heads ({options.heads}), got {options.width}."
            )
        self.patch = options.patch
        places = (height // options.patch) * (width // options.patch)
        self.embed = nn.Linear(channels * options.patch**2, options.width)
        self.positions = nn.Parameter(torch.empty(1, places, options.width))
        self.blocks = nn.Sequential(*[Block(options.width, options.heads) for _ in range(options.depth)])
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, outputs)

    def reset(self, generator: torch.Generator) -> None:
        """Truncated normal weights, normal positions, zero biases, unit norms."""
        for name, parameter in self.named_parameters():
            if name == "positions":
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif parameter.dim() > 1:
                fan_in_truncated_normal_(parameter, generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (n, channels, height, width) to logits (n, classes)."""
        tokens = self.blocks(self.embed(patches(inputs, self.patch)) + self.positions)
        return self.head(self.norm(tokens).mean(1))
