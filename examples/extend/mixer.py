"""A model family: a small MLP-Mixer for images.

Guarantee: none of its own. Gradients of single examples are taken of any module in which examples do not
meet: layer norm is fine, batch norm is refused. Its first parameters come from torch's global generator,
which stands where the run's seed says while the constructor runs.
Source: Tolstikhin et al. 2021, "MLP-Mixer: An all-MLP Architecture for Vision".
"""

from torch import nn

import fedsim


class Block(nn.Module):
    """Mix the tokens of each channel, then the channels of each token."""

    def __init__(self, tokens, width):
        super().__init__()
        self.before_tokens, self.before_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.tokens(self.before_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.before_channels(x))


class Mixer(nn.Module):
    """Patches of an image as tokens, `depth` blocks, the mean of the tokens, a linear head.

    `input_shape` (channels, height, width) and `outputs` are what fedsim says of the data; the rest options.
    """

    def __init__(self, input_shape, outputs, patch=7, width=16, depth=1):
        super().__init__()
        channels, *sides = input_shape
        if any(side % patch for side in sides):
            raise fedsim.InputError(f"model.options.patch must divide the sides {sides}, got {patch}.")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        tokens = (sides[0] // patch) * (sides[1] // patch)
        self.blocks = nn.Sequential(*(Block(tokens, width) for _ in range(depth)))
        self.head = nn.Linear(width, outputs)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens).mean(1))
