"""Let a column of the table say who holds a row: every clinic is a holder, with its own patients.

Needs data.py beside it.
"""

import data

import fedsim

HOLDERS = {"holders": 5, "nodes": 2, "partition": "natural"}


def main(out="runs/by_column", federation=HOLDERS):
    columns = {"numbers": {"age": [18, 95]}, "target": "long", "classes": ["no", "yes"], "holder": "clinic"}
    return fedsim.train(
        data={"name": "table", "root": data.stays(), "options": columns},
        model="linear",
        federation=federation,
        privacy={"target_epsilon": 3.0, "delta": 1e-5},
        train={"steps": 20, "expected_batch_size": 500},
        out=out,
    )


if __name__ == "__main__":
    print(main())
