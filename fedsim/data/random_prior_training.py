"""Teach the encoder of `random_prior` to tell images of random processes apart.

    python -m fedsim.data.random_prior_training [--steps 2500] [--out random_prior.safetensors]

Contrastive learning (Chen et al. 2020, SimCLR): two views of each of BATCH images, and a loss that asks which
two belong together. Images, views and initial weights come from fixed keys and one thread does the sums, so
the same kind of processor makes the same weights again; another one rounds differently. No data is read.
About an hour on one core with bfloat16. Without --out the weights go to the working folder: those of the
package are a constant of the feature map.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fedsim import seeds
from fedsim.data import random_images, random_prior

BATCH = 256  # images a step, two views of each
EDGE = 28
TEMPERATURE = 0.15
RATE = 2e-3
AVERAGE = 0.995


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a view of each image (n, 1, H, W): moved, turned, sheared, mirrored, darker or brighter, some
    blurred or inverted, all with fine noise."""
    n = len(images)

    def uniform(low: float, high: float, shape: tuple[int, ...] = (n,)) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def some(share: float) -> Tensor:
        return uniform(0, 1, (n, 1, 1, 1)) < share

    scale, ratio = torch.exp(uniform(math.log(0.45), math.log(1.1))), torch.exp(uniform(-0.25, 0.25))
    angle, mirror = uniform(-0.25, 0.25), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    maps = torch.zeros(n, 2, 3)
    maps[:, 0, 0] = scale * ratio * torch.cos(angle) * mirror
    maps[:, 0, 1] = -scale / ratio * torch.sin(angle)
    maps[:, 1, 0] = scale * ratio * torch.sin(angle) * mirror
    maps[:, 1, 1] = scale / ratio * torch.cos(angle)
    maps[:, :, 2] = uniform(-1, 1, (n, 2)) * (1 - scale.clamp(max=1))[:, None]
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    seen = (seen - 0.5) * uniform(0.5, 1.4, (n, 1, 1, 1)) + 0.5 + uniform(-0.25, 0.25, (n, 1, 1, 1))
    seen = seen.clamp(0, 1)
    seen = torch.where(some(0.3), F.avg_pool2d(seen, 3, 1, 1), seen)
    seen = torch.where(some(0.15), 1 - seen, seen)
    return seen + 0.04 * torch.randn(seen.shape, generator=generator)


def loss(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean cross-entropy of finding each embedding's other view among all (n, d) of both."""
    embedded = F.normalize(torch.cat([first, second]), dim=1)
    similar = embedded @ embedded.t() / TEMPERATURE
    similar.fill_diagonal_(-math.inf)
    n = len(first)
    return F.cross_entropy(similar, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))


def train(steps: int, every: int = 100) -> random_prior.Encoder:
    """Return the average of the encoder over the last steps of training; prints a line every `every`."""
    encoder = random_prior.Encoder()
    head = nn.Sequential(nn.Linear(random_prior.CHANNELS[-1], 256), nn.ReLU(), nn.Linear(256, 96))
    network = _drawn(nn.Sequential(encoder, head)).to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        encoder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE), use_buffers=True
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-4)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)) + 5e-3

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        generator = seeds.torch_stream(0, "random prior", step)
        images = random_images.draw(BATCH, EDGE, EDGE, generator)
        pairs = torch.cat([views(images, generator), views(images, generator)])
        with torch.autocast("cpu", torch.bfloat16):
            embedded = network(pairs.contiguous(memory_format=torch.channels_last))
        value = loss(*embedded.float().split(BATCH))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(encoder)
        if step % every == 0:
            spent = time.perf_counter() - start
            print(f"step {step}/{steps} loss {float(value.detach()):.3f} {spent:.0f} s", flush=True)
    trained = average.module
    assert isinstance(trained, random_prior.Encoder)
    return trained


def _drawn(network: nn.Module) -> nn.Module:
    """Give a network the weights that torch would, from a key of their own."""
    generator = torch.Generator().manual_seed(int.from_bytes(seeds.derive(0, "random prior")[:7], "little"))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return network


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write the weights, in half precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=Path("random_prior.safetensors"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the same sums whatever the number of cores
    state = train(options.steps).state_dict()
    save_file({name: value.half().contiguous() for name, value in state.items()}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
