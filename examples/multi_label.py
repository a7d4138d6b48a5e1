"""Tell which of several labels an image has: none, one or more of them.

Needs data.py beside it.
"""

import data

import fedsim

HOLDERS = {"holders": 30, "nodes": 2, "partition": "iid"}


def main(out="runs/multi_label", federation=HOLDERS):
    return fedsim.train(
        data=fedsim.Data(data.scenes(600, 1), data.scenes(200, 2), labels=3, names=["red", "green", "blue"]),
        task="multi_label",
        model="mlp",
        federation=federation,
        privacy={"target_epsilon": 3.0, "delta": 1e-4},
        train={"steps": 20, "expected_batch_size": 150},
        out=out,
    )


if __name__ == "__main__":
    print(main())
