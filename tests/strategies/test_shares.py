"""shares_dpsgd and local_dpsgd end to end: what they compute, refuse and record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from numpy.typing import NDArray
from scipy import stats

from fedsim import secure_sum
from fedsim.engine import holder as holder_module
from fedsim.engine.experiment import prepare
from fedsim.engine.holder import Node
from fedsim.flower import wire
from fedsim.flower.client_app import app
from fedsim.method import Method
from fedsim.privacy import accountant, events, ledger
from fedsim.privacy.masked_sum import MaskedSum
from fedsim.secure_sum.protocol import DEALT_BYTES, TAG_BYTES
from fedsim.strategies.shares import Shares
from fedsim.types import HolderReply, StepTask
from fedsim.validate import InputError, RunError
from tests.conftest import final, small, train

TINY = ("privacy.noise_multiplier=1e-9", "train.eval_every=1000", "model.dtype=float64")
SHARES = "preset=shares_dpsgd"


def options(**values: object) -> str:
    return "strategy.options={" + ", ".join(f"{k}: {v}" for k, v in values.items()) + "}"


def test_without_noise_to_speak_of_it_is_central_with_clipping(tmp_path: Path) -> None:
    for holders, nodes in ((10, 2), (3, 3)):
        own = (f"federation.holders={holders}", f"federation.nodes={nodes}")
        train(small(*TINY, *own, SHARES), tmp_path / f"shares{holders}")
        train(small(*TINY, *own), tmp_path / f"central{holders}")
        gap = final(tmp_path / f"shares{holders}") - final(tmp_path / f"central{holders}")
        assert torch.max(torch.abs(gap)) < 1e-7


@pytest.mark.parametrize("changes", [{"rotate": "false"}, {"noise": "discrete_gaussian"}, {"ring_bits": 64}])
def test_every_option_computes_the_same_sum(changes: dict[str, object], tmp_path: Path) -> None:
    train(small(*TINY, "train.steps=2", SHARES, options(**changes)), tmp_path / "a")
    train(small(*TINY, "train.steps=2"), tmp_path / "b")
    assert torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b"))) < 1e-7


@pytest.mark.parametrize(
    ("batch", "enough", "alone"),
    [(1, 64, "all"), (11, 64, "some"), (1000, 11, "some"), (1000, 64, "none")],
)
def test_sums_of_all_holders_at_once_equal_those_of_each_alone(
    batch: int, enough: int, alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holders that have enough examples are summed apart, the others together."""
    monkeypatch.setattr(holder_module, "ENOUGH", enough)
    size = f"engine.physical_batch_size={batch}"
    config = small("model.dtype=float64", "federation.nodes=2", size, SHARES)
    node = Node(config, 1, config.seed)
    root_keys = node.method.keys(config.seed, 0)
    task = StepTask(0, 0, 0.3, root_keys)
    clip = node.method.at.clip
    ids = node.drawn(task)
    have = {bool((node.owners(ids) == holder).sum() >= min(batch, enough)) for holder in node.holders}
    assert have == {"all": {True}, "some": {True, False}, "none": {False}}[alone]
    sums, together = node.clipped_sums(ids, task, clip)
    assert together.count == len(ids) == len(together.norms)
    for row, holder in enumerate(node.holders):
        own = node.clipped_sum(ids[node.owners(ids) == holder], task, clip)
        assert torch.allclose(sums[row], own.sum, atol=1e-12)
    whole = node.clipped_sum(ids, task, clip)
    assert torch.allclose(sums.sum(0), whole.sum, atol=1e-12)
    assert torch.allclose(together.norms, whole.norms, rtol=1e-12)  # two engines: equal to rounding
    assert torch.allclose(together.losses, whole.losses, rtol=1e-12)
    nothing, empty = node.clipped_sums(ids[:0], task, clip)
    assert not nothing.any()
    assert empty.count == 0


def test_dropped_holders_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    """With the noise vanishing, the update is the sum over those who stayed; statistics count only them."""
    config = small(*TINY, "train.steps=3", SHARES, options(min_survivors=3, dropout_rate=0.3))
    train(config, tmp_path / "a")
    survivors = [r.facts["survivors"] for r in ledger.read(tmp_path / "a" / "ledger.jsonl").records]
    assert min(survivors) < 10
    train(small(*TINY, "train.steps=3"), tmp_path / "b")
    assert torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b"))) > 1e-4
    train(config, tmp_path / "c")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "c"))


def test_the_result_does_not_depend_on_nodes_or_physical_batch(tmp_path: Path) -> None:
    drop = options(min_survivors=5, dropout_rate=0.2)
    base = ("train.steps=2", "model.dtype=float64", SHARES, drop)
    train(small(*base), tmp_path / "a")
    train(small(*base, "federation.nodes=5", "engine.physical_batch_size=7"), tmp_path / "b")
    gap = torch.max(torch.abs(final(tmp_path / "a") - final(tmp_path / "b")))
    assert gap < 1e-5, "sums that lie on a rounding boundary may differ by one ring unit"


def test_a_shortfall_stops_before_anything_is_released(tmp_path: Path) -> None:
    config = small(SHARES, options(dropout_rate=0.5))
    with pytest.raises(RunError, match=r"holders are left, 10 are needed.*top_up"):
        train(config, tmp_path)
    assert ledger.read(tmp_path / "ledger.jsonl").steps == 0


def test_holders_that_are_offline_count_as_dropped(tmp_path: Path) -> None:
    config = small(SHARES, "federation.availability=0.8", options(min_survivors=3))
    train(config, tmp_path)
    survivors = [r.facts["survivors"] for r in ledger.read(tmp_path / "ledger.jsonl").records]
    assert 3 <= min(survivors) < 10


def test_too_few_shares_to_unmask_are_refused(tmp_path: Path) -> None:
    config = small(
        SHARES, options(on_shortfall="top_up", dropout_rate=0.9, tolerated_dropouts=0.1, corrupt=0.3)
    )
    with pytest.raises(RunError, match="secure sum refused"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((options(min_survivors=11),), "min_survivors must be between 1 and the 10 holders"),
        (("federation.holders=3", options(neighbours=2, threshold=3)), "share threshold must be between"),
        ((options(neighbours=4, threshold=2),), "threshold must be at least 3, more than half"),
        ((options(neighbours=9, threshold=5, corrupt=0.2),), "at least 6, more than half .* the 2 of them"),
        (
            (options(corrupt=0.2, tolerated_dropouts=0.4),),
            "corrupt and twice the dropped ones must be below 1",
        ),
        (("federation.holders=1", "federation.nodes=1"), "must be between 2 and"),
        ((options(threshold=3),), "given together"),
        ((options(corrupt=0.6, tolerated_dropouts=0.6),), "cannot stand"),
        ((options(on_shortfall="ignore"),), "on_shortfall must be one of"),
        ((options(noise="gaussian"),), "noise must be one of"),
        ((options(ring_bits=16),), "ring_bits must be one of"),
        ((options(ring_bits=32), "privacy.noise_multiplier=1e-8"), "ring too small for the sum"),
        (("privacy.target_epsilon=3",), "both given"),
        (("privacy.noise_multiplier=null",), "neither given"),
    ],
)
def test_wrong_combinations_are_refused_with_the_reason(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(small(SHARES, *changes))


def changed(stage: str, change: Callable[[HolderReply], None], step: int = 1) -> Callable[..., Message]:
    """A ClientApp whose node 0 changes arrays of its replies to one stage, from `step` on."""

    def client(message: Message, context: Any) -> Message:
        answer = app(message, context)
        if message.metadata.message_type != "train":
            return answer
        reply = wire.unpack_reply(answer.content)
        if (reply.node, reply.stage) != (0, stage) or reply.step < step:
            return answer
        reply = dataclasses.replace(reply, arrays={n: a.copy() for n, a in reply.arrays.items()})
        change(reply)
        return Message(wire.pack_reply(reply), reply_to=message)

    return client


def flip(row: int, column: int, bit: int) -> Callable[[HolderReply], None]:
    def change(reply: HolderReply) -> None:
        reply.arrays["shares"][row, column, 4] ^= np.uint32(1 << bit)  # type: ignore[index]

    return change


def test_a_flipped_bit_of_a_revealed_share_changes_nothing_and_is_named(tmp_path: Path) -> None:
    """Eight holders of threshold four, two nodes: node 0 hosts holders 0, 2, 4 and 6."""
    own = ("federation.holders=8", SHARES, options(neighbours=7, threshold=4, corrupt=0.0))
    train(small(*own), tmp_path / "a")
    for bit in (0, 17, 31):
        out = tmp_path / str(bit)
        train(small(*own), out, client=changed("unmask", flip(1, 0, bit)))
        assert torch.equal(final(out), final(tmp_path / "a"))
        facts = [r.facts.get("damaged_shares", []) for r in ledger.read(out / "ledger.jsonl").records]
        assert facts == [[]] + 5 * [[[2, 0]]], "holder 2's share of holder 0's seed"


def test_a_flipped_bit_without_a_surplus_share_stops_before_the_ledger(tmp_path: Path) -> None:
    own = ("federation.holders=8", SHARES, options(neighbours=7, threshold=7, corrupt=0.0))
    with pytest.raises(RunError, match=r"6 shares of holder 0's seed came, 7 are needed.*\[2\] were damaged"):
        train(small(*own), tmp_path / "a", client=changed("unmask", flip(1, 0, 3)))
    assert ledger.read(tmp_path / "a" / "ledger.jsonl").steps == 1
    train(small(*own), tmp_path / "a", resume=True)
    train(small(*own), tmp_path / "b")
    assert torch.equal(final(tmp_path / "a"), final(tmp_path / "b"))


def add_to_masked(value: int) -> Callable[[HolderReply], None]:
    def change(reply: HolderReply) -> None:
        masked = reply.arrays["masked"]
        masked[1] += np.array(value).astype(masked.dtype)

    return change


@pytest.mark.parametrize("bits", [32, 64])
def test_a_masked_vector_that_is_no_clipped_sum_with_noise_stops_the_run(bits: int, tmp_path: Path) -> None:
    """Far beyond the bound of an entry, and within it but longer than clipped examples and noise together."""
    config = small(SHARES, options(ring_bits=bits))
    bound = prepare(config).mechanism.settings[0].settings.bound
    for value, message in (
        (1 << (bits - 2), "within the bound give at most"),
        (bound, "secure sum has norm"),
    ):
        out = tmp_path / message[:6]
        with pytest.raises(RunError, match=message):
            train(config, out, client=changed("", add_to_masked(value)))
        assert ledger.read(out / "ledger.jsonl").steps == 1


def test_nodes_take_no_threshold_from_the_server() -> None:
    """What travels is the scale; who exchanges masks, and how many shares it takes, each side finds out."""
    graph = secure_sum.safe_graph(10, 0.05, 0.3)
    for extra, wanted in (
        ((), (graph.degree, graph.threshold)),
        ((options(neighbours=8, threshold=7),), (8, 7)),
    ):
        config = small(SHARES, *extra)
        server, node = prepare(config).mechanism.settings[0], Method.of(config)
        assert isinstance(node.trust, Shares)
        sent = server.to_arrays()
        assert [len(values) for values in sent.values()] == [3, 3], (
            "bound, ring bits, length; scale, variance, weight"
        )
        found = MaskedSum.from_arrays(sent, node.trust._terms(node.at))
        told = dataclasses.replace(server, vector=dataclasses.replace(server.vector, sensitivity=0.0))
        assert found == told, "all but the sensitivity, which nodes do not need"
        made = found.settings
        assert (made.degree, made.threshold) == wanted


def test_the_event_is_that_of_the_rate_at_which_examples_are_drawn() -> None:
    """Of the event, the plan, the tasks, and of what nodes really draw; epsilon is near the central one."""
    for extra in ((), ("federation.availability=0.5", options(min_survivors=2))):
        config = small(SHARES, *extra)
        prepared = prepare(config)
        (release,) = events.releases(prepared.mechanism.event_at(0))
        rate = 60 / 400 / config.federation.availability
        assert release.sampling_rate == prepared.mechanism.sampling_rate == pytest.approx(rate)
        node, drawn, steps = Node(small(SHARES, "federation.nodes=1"), 0, 0), 0, 300
        for step in range(steps):
            task = StepTask(step, 0, release.sampling_rate, prepared.mechanism.method.keys(0, step))
            drawn += len(node.drawn(task))
        spread = math.sqrt(steps * 400 * rate * (1 - rate))
        assert abs(drawn - steps * 400 * rate) < 5 * spread, "false alarm 6e-7"
        central = prepare(small(*(e for e in extra if "options" not in e))).mechanism
        ours, theirs = (
            accountant.epsilon(plan.total_event(500), 1e-5, "rdp_integer", "example").value
            for plan in (prepared.mechanism, central)
        )
        assert ours is not None
        assert theirs is not None
        assert theirs <= ours < 1.02 * theirs, "rounding costs little; half the rate gives half the epsilon"


def test_masks_and_messages_of_all_steps_and_holders_differ(tmp_path: Path) -> None:
    """23 steps, no key, share or certificate twice; masked vectors of two steps differ by uniform numbers."""
    seen: dict[str, list[NDArray[Any]]] = {"public": [], "dealt": [], "confirmations": [], "masked": []}

    def client(message: Message, context: Any) -> Message:
        answer = app(message, context)
        if message.metadata.message_type == "train":
            for name, array in wire.unpack_reply(answer.content).arrays.items():
                if name in seen:
                    seen[name].append(array)
        return answer

    train(small(SHARES, "train.steps=23", "model.name=linear"), tmp_path, client=client)
    for name, width in (("public", 32), ("dealt", DEALT_BYTES), ("confirmations", TAG_BYTES)):
        rows = np.concatenate([a.reshape(-1, width) for a in seen[name]])
        assert len(np.unique(rows, axis=0)) == len(rows) == 23 * 10 * {"public": 3}.get(name, 9)
    masked = np.stack(seen["masked"]).reshape(23, 2, 5, -1)  # steps, nodes, rows, entries
    for gap in range(1, 23):
        difference = masked[gap:] - masked[:-gap]
        assert uniform(difference), f"masks {gap} steps apart"
    assert uniform(masked[:, 0] - masked[:, 1])
    assert uniform(masked[:, :, 1:] - masked[:, :, :-1])
    still = masked.copy()
    still[10:] = still[:-10] + np.uint32(77)
    assert not uniform(still[10:] - still[:-10]), "masks that come again after ten steps are noticed"


def uniform(words: NDArray[np.uint32]) -> bool:
    """Chi-square over the top byte of ring elements; false alarm 1e-6."""
    counts = np.bincount((words >> np.uint32(24)).ravel(), minlength=256)
    return bool(stats.chisquare(counts).pvalue > 1e-6)


@pytest.mark.exact
def test_target_epsilon_is_met_by_the_recorded_event_with_more_real_noise() -> None:
    config = small(SHARES, "privacy.noise_multiplier=null", "privacy.target_epsilon=3")
    plan = prepare(config).mechanism
    assert plan.budget.calibration is not None
    assert plan.budget.calibration.achieved.value == pytest.approx(3.0, rel=1e-3)
    (release,) = events.releases(plan.event_at(0))
    assert release.noise_multiplier == plan.budget.calibration.noise_multiplier
    assert 1.0 <= plan.noise_multiplier / release.noise_multiplier < 1.006
    central = prepare(small("privacy.noise_multiplier=null", "privacy.target_epsilon=3")).mechanism
    assert 1.0 < plan.noise_multiplier / central.noise_multiplier < 1.15, "Renyi instead of PLD"


@pytest.mark.exact
def test_budget_stops_the_run() -> None:
    plan = prepare(small(SHARES, "privacy.stop_at_epsilon=3", "train.steps=500")).mechanism
    assert plan.stopped_by_budget
    assert 0 < plan.steps < 500


def test_local_noise_reaches_the_sum_once_a_holder(tmp_path: Path) -> None:
    config = small("preset=local_dpsgd", "federation.availability=0.5", "train.steps=2")
    prepared = prepare(config)
    release = prepared.mechanism.release()
    # Five of ten holders are online on average.
    assert prepared.mechanism.noise_std_of_sum(release) == pytest.approx(0.5 * math.sqrt(5))
    assert prepared.mechanism.event_at(0) == prepare(small("federation.availability=0.5")).mechanism.event_at(
        0
    )
    train(config, tmp_path / "a")
    train(
        small(
            *("preset=local_dpsgd", "federation.availability=0.5", "train.steps=2"),
            "federation.nodes=5",
        ),
        tmp_path / "b",
    )
    assert np.allclose(final(tmp_path / "a"), final(tmp_path / "b"), atol=1e-5), "noise belongs to holders"
