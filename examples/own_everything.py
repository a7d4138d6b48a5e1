"""Bring a model, a trust model and a task of your own, in own_parts.py beside this script.

Nothing of fedsim is edited. Named as file:Class, they go to the processes of Flower's simulation as well:
backend="simulation".
"""

import fedsim

HOLDERS = {"holders": 20, "nodes": 2, "partition": "iid"}


def main(out="runs/own_everything", federation=HOLDERS, backend="local"):
    parts = {
        "model": {"name": "own_parts:Net", "options": {"width": 16}},
        "strategy": {"name": "own_parts:TwoServers"},
        "task": {"name": "own_parts:Focal", "options": {"gamma": 1.0}},
    }
    images = {"name": "fashion_mnist_subset", "train_examples": 1000, "test_examples": 500}
    privacy = {"target_epsilon": 8.0, "delta": 1e-5}
    rest = {"privacy": privacy, "train": {"steps": 15, "expected_batch_size": 1000}}
    return fedsim.train(data=images, federation=federation, backend=backend, out=out, **parts, **rest)


if __name__ == "__main__":
    print(main())
