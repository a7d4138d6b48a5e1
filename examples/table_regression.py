"""Predict a number from a table, and judge the model by a metric of your own.

What columns can hold is declared, as what they do hold is private; metrics are in the target's own unit.
Needs data.py beside it.
"""

import data

import fedsim
from fedsim.tasks.regression import Regression


@fedsim.metric(unit="%")
def within_a_day(predicted, days):
    return ((predicted - days).abs() <= 1).float().mean(1)


HOLDERS = {"holders": 40, "nodes": 2, "partition": "iid"}


def main(out="runs/table_regression", federation=HOLDERS):
    columns = {"numbers": {"age": [18, 95]}, "words": {"ward": data.WARDS}, "target": "days"}
    stays = {"name": "table", "root": data.stays(), "options": columns}
    task = Regression([within_a_day], headline="within_a_day", center=8.0, scale=5.0, unit="days")
    run = {"data": stays, "task": task, "model": "linear", "federation": federation, "out": out}
    return fedsim.train(**run, privacy={"target_epsilon": 3.0, "delta": 1e-5}, **{"train.steps": 40})


if __name__ == "__main__":
    print(main())
