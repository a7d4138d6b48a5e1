"""Who takes part, and how often, is what the recorded event says: for every private method and form.

Real runs with real nodes, messages and ledger; only the gradients are left out. False alarms: keys are fixed,
and every bound fails for correct sampling with probability at most 1e-6.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.privacy import events, ledger
from fedsim.types import ClippedSum
from tests.conftest import train
from tests.strategies.methods import FORMS, PRIVATE, of
from tests.strategies.small_data import shrunk

pytestmark = pytest.mark.usefixtures("epsilon_takes_no_time")

ALARM = 1e-6
EXAMPLES, BATCH, STEPS = 10_000, 1_500.0, 30
HOLDERS_AS_UNITS = 2_000


class Watched:
    """Notes who takes part in which step, in place of computing what they would add."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        self.online: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        watch, online = self, Node.online

        def note(node: Node, ids: NDArray[np.int64], task: Any) -> ClippedSum:
            watch.taken[task.step].append(np.array(ids, dtype=np.int64))
            nothing = torch.zeros(len(ids), dtype=torch.float64)
            return ClippedSum(node.zero_sum(), len(ids), 1.0, nothing, nothing)

        def clipped_sums(node: Node, ids: Any, task: Any, clip: Any) -> Any:
            return node.zero_sum().repeat(len(node.holders), 1), note(node, ids, task)

        def local_update(node: Node, holder: int, task: Any, how: Any) -> Any:
            watch.taken[task.step].append(np.array([holder]))
            return node.zero_sum(), 0.0

        def seen_online(node: Node, holders: Any, task: Any) -> Any:
            there = online(node, holders, task)
            watch.online[task.step].append(np.asarray(there))
            return there

        monkeypatch.setattr(Node, "clipped_sum", lambda node, ids, task, clip: note(node, ids, task))
        monkeypatch.setattr(Node, "clipped_sums", clipped_sums)
        monkeypatch.setattr(Node, "local_update", local_update)
        monkeypatch.setattr(Node, "online", seen_online)

    def counts(self, units: int, steps: range) -> NDArray[np.int64]:
        """Return how often each unit took part in these steps."""
        taken = [ids for step in steps for ids in self.taken[step]]
        return np.bincount(np.concatenate([np.zeros(0, np.int64), *taken]), minlength=units)


def rate_is(hits: int, trials: int, rate: float) -> bool:
    """Two-sided binomial test; without sampling there is nothing random."""
    if rate == 1.0:
        return hits == trials
    return bool(min(stats.binom.cdf(hits, trials, rate), stats.binom.sf(hits - 1, trials, rate)) > ALARM / 2)


@pytest.fixture(scope="module")
def few_pixels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Who takes part does not depend on how many parameters there are."""
    return shrunk(tmp_path_factory.mktemp("images"), EXAMPLES, 100, 4)


def settings(name: str, share: float = 1.0) -> tuple[str, ...]:
    """A run long enough to notice three per cent, or a share of it."""
    steps, holders = STEPS, 100
    if name.startswith("shares"):
        steps, holders = 24, 10  # what a secure sum costs grows with its holders
    if name.startswith("local"):
        steps, holders = 24, 20  # every holder computes by itself
    if name.startswith("dp_fedavg"):
        steps, holders = 4 * STEPS, HOLDERS_AS_UNITS
    batch = 2_000.0 if name in ("dp_ftrl",) else BATCH  # of which whole passes are made
    return (
        f"data.train_examples={EXAMPLES}",
        "model.name=linear",
        "model.options={}",
        f"federation.holders={holders}",
        "federation.partition=iid",
        f"train.expected_batch_size={batch}",
        f"train.steps={round(share * steps)}",
        "train.eval_every=1000",
        "train.checkpoint_every=1000",
    )


@pytest.mark.parametrize("name", [*PRIVATE, *FORMS])
def test_units_take_part_at_the_rate_of_the_recorded_event(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_pixels: list[str]
) -> None:
    config = of(name, *settings(name), *few_pixels)
    plan = prepare(config).mechanism
    units = EXAMPLES if plan.unit == "example" else config.federation.holders
    watched = Watched(monkeypatch)
    train(config, tmp_path)
    recorded = ledger.read(tmp_path / "ledger.jsonl").records
    starts = [r.step for r in recorded if events.releases(r.event)]
    hits = trials = 0
    rates = set()
    for start, end in zip(starts, [*starts[1:], len(recorded)], strict=True):
        if end - start != plan.budget.family.period:
            continue  # a period that the run cuts short
        ((_, rate, times, _),) = events.releases(recorded[start].event)
        counts = watched.counts(units, range(start, end))
        assert counts.max() <= times, "nobody more often than there are releases"
        hits, trials = hits + int(counts.sum()), trials + units * times
        rates.add(rate)
    (rate,) = rates
    assert rate_is(hits, trials, rate)
    if rate < 1.0:
        for wrong in (1.03, 1 / 1.03):
            assert not rate_is(hits, trials, min(1.0, rate * wrong)), "three per cent would be noticed"


@pytest.mark.parametrize("name", [n for n in PRIVATE if n not in ("dp_ftrl", "dp_mf")])
def test_the_rate_is_that_among_those_who_are_online(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_pixels: list[str]
) -> None:
    """dp_ftrl and dp_mf throw examples into steps whoever is online; the others draw at a higher rate."""
    few, availability = ["strategy.options.min_survivors=2"], 0.9  # a secure sum needs most of its holders
    if not name.startswith("shares"):
        few, availability = [], 0.6
    share = 0.25 if name == "dp_fedavg" else 1.0  # nothing here is as near as three per cent
    away = f"federation.availability={availability}"
    config = of(name, *settings(name, share), away, *few, *few_pixels)
    prepared = prepare(config)
    watched = Watched(monkeypatch)
    train(config, tmp_path)
    sizes, by_holder = prepared.partition.sizes(), prepared.mechanism.unit == "holder"
    hits = trials = 0
    for record in ledger.read(tmp_path / "ledger.jsonl").records:
        ((_, rate, times, _),) = events.releases(record.event)
        there = np.unique(np.concatenate(watched.online[record.step]))
        taken = np.concatenate([np.zeros(0, np.int64), *watched.taken[record.step]])
        owners = taken if by_holder else prepared.partition.holder_of[taken]
        assert np.isin(owners, there).all()
        hits += len(taken)
        trials += times * (len(sizes) if by_holder else int(sizes[there].sum()))
    assert rate == pytest.approx(BATCH / EXAMPLES / availability)
    # Holders are asked whether they are online once they are drawn, so those who are not count as trials.
    assert rate_is(hits, trials, rate * availability if by_holder else rate)
    if not by_holder:
        assert not rate_is(hits, trials, rate * availability), "the rate over all, online or not"


@pytest.mark.parametrize("name", PRIVATE)
def test_draws_of_a_secure_run_follow_from_its_secret_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_pixels: list[str]
) -> None:
    """Amplification by sampling is lost on whoever knows the draw, and the seed is public."""
    drawn = []
    many = ["federation.holders=200", "train.expected_batch_size=200"] if name == "dp_fedavg" else []
    for source in ("seeded", "secure", "secure"):  # equal draws by chance: below 1e-50
        config = of(
            name, f"privacy.noise_source={source}", "train.steps=4", "model.name=linear", *many, *few_pixels
        )
        with monkeypatch.context() as patch:
            watched = Watched(patch)
            train(config, tmp_path / str(len(drawn)))
        drawn.append([np.sort(np.concatenate(watched.taken[step])).tolist() for step in range(4)])
    for step in range(4):
        of_step = [run[step] for run in drawn]
        assert of_step[0] != of_step[1] != of_step[2] != of_step[0]
