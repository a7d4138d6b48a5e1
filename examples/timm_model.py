"""Train a model of timm by its name, its batch norms replaced by group norms.

Batch norm mixes the examples of a batch, so that none has a gradient of its own to clip: `fix` replaces it.
In float32 a net with such norms parts from itself by rounding at large rates; in float64 it does not.
Needs data.py beside it.
"""

import data

import fedsim

HOLDERS = {"holders": 20, "nodes": 2, "partition": "iid"}


def main(out="runs/timm_model", federation=HOLDERS):
    return fedsim.train(
        model={"name": "timm", "options": {"architecture": "test_resnet"}, "fix": True, "dtype": "float64"},
        data={"name": "image_folder", "root": data.photos(), "options": {"size": 16}},
        federation=federation,
        privacy={"target_epsilon": 8.0, "delta": 1e-4},
        train={"steps": 3, "expected_batch_size": 100},
        out=out,
    )


if __name__ == "__main__":
    print(main())
