"""Train a torch module of your own, from the weights it has.

The module itself stays as it is: a copy of it is trained, and `run.model` is the result.
"""

import torch
from torch import nn

import fedsim

HOLDERS = {"holders": 50, "nodes": 2}


def main(out="runs/own_module", federation=HOLDERS):
    torch.manual_seed(7)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))
    images = {"name": "fashion_mnist_subset", "train_examples": 4000, "test_examples": 1000}
    privacy = {"target_epsilon": 3.0, "delta": 1e-5}
    train = {"steps": 20, "expected_batch_size": 400}
    return fedsim.train(model=net, data=images, federation=federation, privacy=privacy, train=train, out=out)


if __name__ == "__main__":
    print(main())
