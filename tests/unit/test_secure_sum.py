"""The secure sum: exact whatever drops out, private below the threshold, linear cost, refusals.

Statistical checks have fixed keys, reject correct behaviour with probability at most 1e-6, and are also run
on a wrong version, which they must reject.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedsim import seeds
from fedsim.secure_sum import Holder, Reveal, Ring, Server, Settings, neighbourhoods, safe_graph, shamir
from fedsim.secure_sum import arrays as messages
from fedsim.secure_sum import keys as secure_keys
from fedsim.secure_sum.protocol import DEALT_BYTES, TAG_BYTES, graph_of, pair_key
from fedsim.validate import InputError, RunError

ALARM = 1e-6
STAGES = 5


def agreed(holders: int, length: int = 7, degree: int | None = None, **changes: Any) -> Settings:
    degree = holders - 1 if degree is None else degree
    body: dict[str, Any] = {
        "holders": holders,
        "degree": degree,
        "threshold": degree // 2 + 1,
        "least_inputs": 2,
        "bound": 10**6,
        "ring": Ring(32),
        "length": length,
    }
    return Settings(**{**body, **changes})


def speakers(common: Settings, seed: int = 5) -> list[Holder]:
    return [Holder(h, common, seeds.derive(seed, "holder", h)) for h in range(common.holders)]


def run(
    common: Settings,
    values: NDArray[np.int64],
    last_stage: dict[int, int] | None = None,
) -> tuple[NDArray[np.int64], Server]:
    """Run the protocol; holder h answers only stages below last_stage[h] (default: all five)."""
    gone = last_stage or {}
    holders = speakers(common)

    def here(stage: int) -> list[Holder]:
        return [h for h in holders if stage < gone.get(h.index, STAGES)]

    server = Server(common)
    server.take_adverts({h.index: h.advertise() for h in here(0)})
    server.take_shares({h.index: h.share(server.adverts) for h in here(1)})
    server.take_masked({h.index: h.mask(values[h.index], server.adverts, server.sealed) for h in here(2)})
    server.take_confirmations(
        {h.index: h.confirm(server.adverts, server.sealed, server.masked) for h in here(3)}
    )
    return server.total({h.index: reveal(h, server) for h in here(4)}), server


def reveal(holder: Holder, server: Server, arrived: Iterable[int] | None = None) -> Reveal:
    """What a holder reveals, told the truth or another story of whose vectors arrived."""
    return holder.unmask(
        server.adverts,
        server.sealed,
        server.masked if arrived is None else list(arrived),
        server.inbound(holder.index),
        server.confirmations(holder.index),
    )


def before_reveal(common: Settings, values: NDArray[np.int64], silent: Iterable[int] = ()) -> Server:
    """A server that has everything but the reveals; `silent` holders stop after sharing."""
    holders, server = speakers(common), Server(common)
    here = [h for h in holders if h.index not in set(silent)]
    server.take_adverts({h.index: h.advertise() for h in holders})
    server.take_shares({h.index: h.share(server.adverts) for h in holders})
    server.take_masked({h.index: h.mask(values[h.index], server.adverts, server.sealed) for h in here})
    server.take_confirmations(
        {h.index: h.confirm(server.adverts, server.sealed, server.masked) for h in here}
    )
    return server


def draw_values(common: Settings, seed: int = 0) -> NDArray[np.int64]:
    shape = (common.holders, common.length)
    return seeds.stream(seed, "values").integers(-common.bound, common.bound, shape, endpoint=True)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(holders=st.integers(2, 100), data=st.data())
def test_sum_is_exact_with_up_to_two_fifths_dropping_at_any_stage(holders: int, data: st.DataObject) -> None:
    most = holders - 1 - agreed(holders).threshold  # neighbours that can go
    dropped = data.draw(st.integers(0, min(most, int(0.4 * holders))))
    who = data.draw(st.permutations(range(holders)))[:dropped]
    gone = {h: data.draw(st.integers(0, STAGES - 1)) for h in who}
    common = agreed(holders, ring=Ring(data.draw(st.sampled_from([32, 64]))))
    values = draw_values(common)
    total, server = run(common, values, gone)
    included = [h for h in range(holders) if gone.get(h, STAGES) > 2]
    assert sorted(server.masked) == included
    assert np.array_equal(total, values[included].sum(axis=0))


@pytest.mark.parametrize("stage", range(STAGES))
def test_sum_is_exact_on_a_sparse_graph(stage: int) -> None:
    graph = safe_graph(1000, corrupt=0.05, dropped=0.2)
    assert graph.degree < 300
    holders = 300
    common = agreed(holders, degree=40, threshold=21)
    values = draw_values(common)
    total, server = run(common, values, dict.fromkeys(range(0, holders, 5), stage))
    assert all(len(n) == 40 for n in server.neighbours.values())
    assert np.array_equal(total, values[sorted(server.masked)].sum(axis=0))


def test_values_at_the_bound_come_back_and_beyond_it_are_refused() -> None:
    top = (2**31 - 1) // 3
    common = agreed(3, bound=top)
    values = np.full((3, 7), -top)
    assert np.array_equal(run(common, values)[0], values.sum(axis=0))
    with pytest.raises(RunError, match="above the stated bound"):
        run(common, values - 1)
    with pytest.raises(InputError, match="ring too small for the sum"):
        agreed(3, bound=top + 1)
    assert agreed(3, bound=top + 1, ring=Ring(64)).ring.bits == 64


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 holders"):
        agreed(1, degree=1)
    for threshold in (2, 5):  # half of the neighbours, and more than all
        with pytest.raises(InputError, match="share threshold must be between 3 and 4, more than half"):
            agreed(5, threshold=threshold)
    with pytest.raises(InputError, match="cannot stand"):
        safe_graph(10, corrupt=0.5, dropped=0.5)
    with pytest.raises(InputError, match="must have length 7"):
        run(agreed(3), np.zeros((3, 8), dtype=np.int64))


def test_too_few_survivors_are_refused_by_both_roles() -> None:
    common = agreed(10, threshold=6, least_inputs=5)
    values = draw_values(common)
    for stage in range(4):
        with pytest.raises(RunError, match="refused"):
            run(common, values, dict.fromkeys(range(6), stage))
    with pytest.raises(RunError, match=r"shares of holder .* are needed. Too many holders dropped out"):
        run(common, values, dict.fromkeys(range(5), 4))
    holder = speakers(common)[0]
    adverts = {h.index: h.advertise() for h in speakers(common)}
    for ask in (holder.confirm, lambda *told: holder.unmask(*told, {}, {})):
        with pytest.raises(RunError, match="4 holders are left, at least 5"):
            ask(adverts, range(10), range(4))
        with pytest.raises(RunError, match="impossible set"):
            ask(adverts, range(5), range(10))
        with pytest.raises(RunError, match="impossible set"):
            ask(adverts, range(10), range(1, 10))


def test_a_holder_reveals_one_kind_of_share_a_neighbour() -> None:
    common = agreed(6, threshold=3)
    server = before_reveal(common, draw_values(common), silent=(4, 5))
    told = reveal(speakers(common)[0], server)
    assert set(told.seeds) == {1, 2, 3}
    assert set(told.keys) == {4, 5}


def uniform(elements: Iterable[int] | NDArray[Any], bits: int = 32) -> bool:
    """Chi-square over 256 bins of the top byte and of the low byte of ring elements."""
    words = np.asarray(elements).astype(np.uint64)
    for shift in (0, bits - 8):
        counts = np.bincount(((words >> np.uint64(shift)) & np.uint64(255)).astype(np.int64), minlength=256)
        if stats.chisquare(counts).pvalue <= ALARM:
            return False
    return True


def below_threshold(length: int = 20_000) -> tuple[Settings, NDArray[np.int64], Server, list[Reveal]]:
    """Everything a server sees, with one share fewer than the threshold of every secret."""
    common = agreed(6, length=length, threshold=3)
    values = np.full((6, length), 1234)
    server = before_reveal(common, values)
    return common, values, server, [reveal(h, server) for h in speakers(common)[:2]]


def test_masked_vectors_are_uniform_for_a_server_below_the_threshold() -> None:
    common, values, server, _ = below_threshold()
    for vector in server.masked.values():
        assert uniform(vector)
    everything = np.sum([v.astype(np.uint64) for v in server.masked.values()], axis=0) & 0xFFFFFFFF
    assert uniform(everything), "the own masks hide even the sum until the threshold is met"
    assert not uniform(common.ring.encode(values[0], common.bound)), "a vector without masks is rejected"
    half = np.add(common.ring.encode(values[0], common.bound), server.masked[0] & np.uint32(0xFFFFFF))
    assert not uniform(half), "a mask that does not fill the ring is rejected"


def test_every_part_of_the_sum_stays_hidden_after_unmasking() -> None:
    """With all own masks known, the pairwise masks still hide every partial sum; only the whole is plain."""
    common, values, server, _ = below_threshold()
    bare = {}
    for holder, vector in server.masked.items():
        bare[holder] = vector.copy()
        seed = seeds.derive(speakers(common)[holder].secret, "own mask")
        secure_keys.add_mask(bare[holder], seed, common.ring, subtract=True)
    for part in ([0], [0, 1], [0, 2, 4], [0, 1, 2, 3, 4]):
        assert uniform(np.stack([bare[h] for h in part]).sum(axis=0, dtype=np.uint32))
    whole = np.stack([bare[h] for h in range(6)]).sum(axis=0, dtype=np.uint32)
    assert np.array_equal(common.ring.decode(whole), values.sum(axis=0))
    assert not uniform(whole)


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """Over many keys, shares below the threshold have one law for two secrets; `threshold` have not."""
    points, secrets = np.arange(1, 6), (bytes(32), b"\xff" * 32)
    seen: dict[int, list[NDArray[Any]]] = {0: [], 1: []}
    for which, secret in enumerate(secrets):
        for i in range(3000):
            key = seeds.derive(9, "shares", which, i)
            seen[which].append(shamir.share([secret], points, 3, key)[:3, 0, 0].astype(np.int64))
    a, b = np.array(seen[0]), np.array(seen[1])
    for statistic in (lambda s: s[:, 0], lambda s: s[:, 1], lambda s: (s[:, 0] + 7 * s[:, 1]) % shamir.PRIME):
        assert stats.ks_2samp(statistic(a), statistic(b)).pvalue > ALARM
    at_zero = [3, -3, 1]  # Lagrange weights at points 1, 2, 3

    def combined(s: NDArray[Any]) -> NDArray[Any]:
        return (s @ np.array(at_zero)) % shamir.PRIME

    assert stats.ks_2samp(combined(a), combined(b)).pvalue < ALARM, "three shares tell them apart"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.integers(0, 8), st.randoms())
def test_any_threshold_of_shares_rebuilds_the_secret(secret: bytes, need: int, more: int, rng: Any) -> None:
    points = np.array(sorted(rng.sample(range(1, 2**31 - 1), need + more)))
    shares = shamir.share([secret, bytes(32)], points, need, seeds.derive(1, "test"))
    chosen = np.array(rng.sample(range(need + more), need))
    assert shamir.combine(shares[chosen], points[chosen]) == [secret, bytes(32)]
    if need > 1:  # one share short: another secret, or none, comes out
        with contextlib.suppress(RunError):
            assert shamir.combine(shares[chosen[1:]], points[chosen[1:]])[0] != secret


def test_shares_with_wrong_points_or_secrets_are_refused() -> None:
    key = bytes(32)
    with pytest.raises(InputError, match="distinct"):
        shamir.share([key], np.array([1, 1]), 1, key)
    with pytest.raises(InputError, match="distinct"):
        shamir.share([key], np.array([0, 1]), 1, key)
    with pytest.raises(InputError, match="threshold"):
        shamir.share([key], np.array([1, 2]), 3, key)
    with pytest.raises(InputError, match="32 bytes"):
        shamir.share([b"short"], np.array([1, 2]), 2, key)


def test_pairs_agree_on_their_mask_and_nobody_else_has_it() -> None:
    common = agreed(3)
    a, b, c = speakers(common)
    adverts = {h.index: h.advertise() for h in (a, b, c)}
    ab = pair_key(a._private("mask"), adverts[1].mask, 0, 1)
    assert ab == pair_key(b._private("mask"), adverts[0].mask, 1, 0)
    assert ab != pair_key(c._private("mask"), adverts[0].mask, 2, 0)
    assert Holder(0, common, seeds.derive(6, "holder", 0)).advertise() != a.advertise()


def test_graph_is_regular_symmetric_and_random() -> None:
    present = np.arange(0, 400, 4)
    first, second = (neighbourhoods(present, 9, seeds.derive(k, "graph")) for k in (1, 2))
    for holder, near in first.items():
        assert len(near) == 10
        assert holder not in near
        assert all(holder in first[int(other)] for other in near)
    assert any(not np.array_equal(first[h], second[h]) for h in first)
    assert len(neighbourhoods(present[:5], 9, bytes(32))[0]) == 4


def test_safe_graphs_grow_slowly_and_keep_their_promise() -> None:
    degrees = [safe_graph(n, corrupt=0.05, dropped=0.1).degree for n in (1000, 10_000, 100_000)]
    assert degrees[2] < 2 * degrees[0] < 300
    graph = safe_graph(1000, corrupt=0.05, dropped=0.3)
    for key in range(20):
        near = neighbourhoods(np.arange(1000), graph.degree, seeds.derive(key, "graph"))
        table = np.stack([near[h] for h in range(1000)])
        assert np.sum(table < 50, axis=1).max() < graph.threshold, "the first 5% are corrupt"
        assert np.sum(table >= 300, axis=1).min() >= graph.threshold, "the first 30% dropped"


def test_messages_survive_packing_into_arrays() -> None:
    common = agreed(9, degree=4, threshold=3)
    holders, rows = speakers(common), np.arange(9)
    adverts = {h.index: h.advertise() for h in holders if h.index != 3}
    here = rows != 3
    assert messages.unpack_adverts(messages.pack_adverts(adverts, range(9)), here, rows) == adverts
    graph = graph_of(common, adverts)
    dealt = {h: holders[h].share(adverts) for h in adverts}
    packed = messages.pack_pairs(dealt, graph, range(9), 4, DEALT_BYTES)
    assert messages.unpack_pairs(packed, here, rows, graph) == dealt
    shared, arrived = set(adverts), set(adverts) - {5}
    server = Server(common)
    server.take_adverts(adverts)
    server.take_shares(dealt)
    confirmed = {h: holders[h].confirm(adverts, shared, arrived) for h in arrived}
    packed = messages.pack_pairs(confirmed, graph, range(9), 4, TAG_BYTES)
    assert messages.unpack_pairs(packed, np.isin(rows, list(arrived)), rows, graph, arrived) == confirmed
    reveals = {
        h: holders[h].unmask(
            adverts, shared, arrived, server.inbound(h), {o: c[h] for o, c in confirmed.items() if h in c}
        )
        for h in arrived
    }
    table = messages.pack_reveals(reveals, graph, range(9), 4)
    back = messages.unpack_reveals(table, np.isin(rows, list(arrived)), rows, graph, shared, arrived)
    for h, told in reveals.items():
        for kind in ("seeds", "keys"):
            assert {o: s.tolist() for o, s in getattr(told, kind).items()} == {
                o: s.tolist() for o, s in getattr(back[h], kind).items()
            }


def cost(holders: int, length: int, monkeypatch: pytest.MonkeyPatch, degree: int | None = None) -> int:
    """Mask words one holder makes in stage 3."""
    made = 0
    words = seeds.words

    def counting(key: bytes, start: int, count: int) -> NDArray[np.uint64]:
        nonlocal made
        made += count
        return words(key, start, count)

    common = agreed(holders, length=length, degree=degree)
    group = speakers(common)
    adverts = {h.index: h.advertise() for h in group}
    graph_of(common, adverts)
    monkeypatch.setattr("fedsim.secure_sum.keys.seeds.words", counting)
    group[0].mask(np.zeros(length, dtype=np.int64), adverts, range(holders))
    monkeypatch.undo()
    return made


def test_a_holders_cost_grows_linearly_and_with_a_fixed_degree_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for holders in (10, 20, 40):
        assert cost(holders, 10_000, monkeypatch) == holders * 5_000
    assert cost(20, 40_000, monkeypatch) == 4 * cost(20, 10_000, monkeypatch)
    assert cost(50, 10_000, monkeypatch, degree=8) == cost(200, 10_000, monkeypatch, degree=8) == 9 * 5_000


def test_a_hundred_holders_with_100_000_parameters_take_seconds() -> None:
    common = agreed(100, length=100_000)
    values = draw_values(common)
    began = time.process_time()
    total, _ = run(common, values, {h: h % STAGES for h in range(0, 100, 10)})
    spent = time.process_time() - began
    included = [h for h in range(100) if h % 10 or h % STAGES > 2]
    assert np.array_equal(total, values[included].sum(axis=0))
    assert spent < 10.0, "both roles together, on one core"
