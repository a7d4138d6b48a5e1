"""The declared cap on a holder's examples: kept by a keyed choice; epsilon per holder follows from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim import seeds
from fedsim.config import Config, FederationConfig
from fedsim.data.partition import Partition, partition
from fedsim.engine.experiment import epsilons, prepare
from fedsim.merging import Choice
from fedsim.partitions import Material
from fedsim.privacy import accountant, ledger
from fedsim.validate import InputError
from fedsim.visibility import Public, Sensitive
from tests.conftest import final, small, train
from tests.strategies import methods

UNEVEN = ("federation.partition=power_law", "federation.partition.options.exponent=1.0")
KEY = seeds.derive(7, "used examples")


def uneven(count: int = 400, holders: int = 10, at_most: int | None = None, seed: int = 0) -> Partition:
    config = FederationConfig(
        holders=holders,
        partition=Choice("power_law", {"exponent": 1.0}),
        examples_per_holder_at_most=at_most,
    )
    return partition(Material(count), config, seed)


def test_no_holder_uses_more_and_smaller_ones_use_all() -> None:
    whole = uneven()
    for at_most in (1, 20, 45, 1000):
        capped = uneven(at_most=at_most)
        assert np.array_equal(capped.holder_of, whole.holder_of), "ids and owners survive"
        assert np.array_equal(capped.sizes(), np.minimum(whole.sizes(), at_most))
        assert capped.examples == capped.sizes().sum()
        ids = np.concatenate([capped.ids_of_node(node, 3) for node in range(3)])
        assert len(ids) == len(set(ids.tolist())) == capped.examples
        assert np.array_equal(np.bincount(capped.holder_of[ids], minlength=10), capped.sizes())
        assert capped.label_counts(np.zeros(400, np.int64), 1).sum() == capped.examples


def test_the_choice_depends_on_the_key_and_the_holders_ids_alone() -> None:
    whole = uneven()
    largest = int(np.argmax(whole.sizes()))
    mine = np.flatnonzero(whole.holder_of == largest)

    def chosen(parts: Partition, key: bytes) -> set[int]:
        used = parts.capped(20, key).used
        assert used is not None
        return set(np.flatnonzero(used & (parts.holder_of == largest)).tolist())

    first = chosen(whole, KEY)
    assert first == chosen(whole, KEY)
    assert first != chosen(whole, seeds.derive(8, "used examples"))
    others = whole.holder_of.copy()
    rest = np.flatnonzero(whole.holder_of != largest)
    others[rest] = others[np.random.default_rng(0).permutation(rest)]
    assert chosen(Partition(others, 10), KEY) == first
    assert first < set(mine.tolist())


def test_every_example_has_the_same_chance_to_be_used() -> None:
    parts = Partition(np.zeros(40, np.int64), 1)
    counts = np.zeros(40)
    for seed in range(2000):
        counts += np.asarray(parts.capped(10, seeds.derive(seed, "used examples")).used)
    # Binomial(2000, 1/4): standard deviation 19.4; 40 counts, false alarm 1e-6 by 5.5 of them.
    assert np.abs(counts - 500).max() < 5.5 * 19.4


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="examples_per_holder_at_most"):
        small("federation.examples_per_holder_at_most=0")


@pytest.mark.parametrize("name", methods.ALL)
def test_examples_above_the_cap_reach_no_update(name: str, tmp_path: Path) -> None:
    """Other content in unused examples changes no parameter; in used ones it does."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((400, 6)).astype(np.float32)
    labels = random.integers(0, 3, 400)
    used = np.asarray(uneven(at_most=20).used)
    assert 0 < used.sum() < 400
    finals = {}
    for case, rows in {"as it is": np.zeros(400, bool), "unused": ~used, "used": used}.items():
        changed = inputs.copy()
        changed[rows] += 1.0
        root = arrays(tmp_path / f"{case} data", changed, labels, inputs[:50], labels[:50])
        train(of(name, root), tmp_path / case)
        finals[case] = final(tmp_path / case)
    assert torch.equal(finals["as it is"], finals["unused"])
    assert not torch.equal(finals["as it is"], finals["used"])


@pytest.mark.parametrize("name", ["central_dpsgd", "local_dpsgd", "dp_mf"])
def test_epsilon_per_holder_is_that_of_the_cap_in_result_and_ledger(name: str, tmp_path: Path) -> None:
    config = small(f"preset={name}", *UNEVEN, "federation.examples_per_holder_at_most=50")
    experiment = prepare(config)
    assert experiment.facts.examples == np.minimum(uneven().sizes(), 50).sum()
    assert experiment.facts.largest_holder == Public(50)
    spent = epsilons(experiment.mechanism, 6, config)["holder"]
    assert isinstance(spent, Public)
    event = experiment.mechanism.total_event_for_holder(6, 50)
    assert spent.value == accountant.holder_epsilon_of_event(event, 1e-5, 50).among(10)
    if name == "dp_mf":
        assert experiment.mechanism.holder_noise_factor < 1.0, "what the ledger's header must say"
        assert event != experiment.mechanism.total_event(6)
    result = train(config, tmp_path)
    assert result["epsilon"]["holder"]["value"] == pytest.approx(spent.value.value)
    assert "epsilon.holder" not in result["sensitive"]
    book = ledger.read(tmp_path / "ledger.jsonl")
    assert book.header.examples_per_holder_at_most == 50
    assert book.holder_epsilon(50).value == pytest.approx(spent.value.value)


def test_without_a_cap_epsilon_per_holder_is_the_largest_ones_and_sensitive(tmp_path: Path) -> None:
    config = small(*UNEVEN)
    sizes = uneven().sizes()
    experiment = prepare(config)
    assert isinstance(experiment.facts.largest_holder, Sensitive)
    assert experiment.facts.largest_holder.value == sizes.max() > sizes.mean() + 50
    spent = epsilons(experiment.mechanism, 6, config)["holder"]
    assert isinstance(spent, Sensitive)
    event = experiment.mechanism.total_event(6)
    assert spent.value == accountant.holder_epsilon_of_event(event, 1e-5, int(sizes.max())).among(10)
    result = train(config, tmp_path)
    assert result["epsilon"]["holder"]["value"] == pytest.approx(spent.value.value)
    assert {"epsilon.holder", "largest_holder"} <= set(result["sensitive"])
    assert ledger.read(tmp_path / "ledger.jsonl").header.examples_per_holder_at_most is None


def test_the_cap_stands_for_the_largest_holder_whatever_its_size() -> None:
    facts = prepare(small(*UNEVEN, "federation.examples_per_holder_at_most=1000")).facts
    assert facts.largest_holder == Public(1000)
    assert facts.examples == 400


def test_what_shares_send_does_not_depend_on_the_largest_holder() -> None:
    """Without a cap the ring holds what one holder of everything would send."""
    runs = [
        prepare(small("preset=shares_dpsgd", f"federation.partition={scheme}"))
        for scheme in ("iid", "power_law")
    ]
    agreed = [run.mechanism.settings for run in runs]
    assert agreed[0] != (None,)
    assert agreed[0] == agreed[1]
    assert [run.facts.most_of_a_holder for run in runs] == [400, 400]
    stds = [run.mechanism.release().noise_stds for run in runs]
    assert stds[0] == stds[1]
    assert stds[0]["sum"] > 0


def of(name: str, root: Path) -> Config:
    """Three steps of a strategy on an uneven federation whose holders use 20 examples at most."""
    noise = ["privacy.noise_multiplier=null", "privacy.clip_norm=1.0"] if name == "nonprivate" else []
    return small(
        f"preset={name}",
        *noise,
        *UNEVEN,
        "federation.examples_per_holder_at_most=20",
        "train.steps=3",
        "train.expected_batch_size=37",  # a fifth of the 185 examples that are used
        "data.name=arrays",
        "data.options.classes=3",
        f"data.root={root}",
        "data.train_examples=null",
        "data.test_examples=null",
    )


def arrays(root: Path, *values: np.ndarray) -> Path:
    """Write a data set of plain arrays."""
    root.mkdir()
    for name, value in zip(
        ("train_inputs", "train_targets", "test_inputs", "test_targets"), values, strict=True
    ):
        np.save(root / f"{name}.npy", value)
    return root
