"""Train on a folder of images of mixed sizes, train/CLASS/FILE and test/CLASS/FILE, all brought to one.

Needs data.py beside it.
"""

import data

import fedsim

HOLDERS = {"holders": 20, "nodes": 2, "partition": "iid"}


def main(out="runs/mixed_sizes", federation=HOLDERS):
    return fedsim.train(
        data={"name": "image_folder", "root": data.photos(), "options": {"size": 16}},
        model="mlp",
        federation=federation,
        privacy={"target_epsilon": 3.0, "delta": 1e-4},
        train={"steps": 20, "expected_batch_size": 100},
        out=out,
    )


if __name__ == "__main__":
    print(main())
