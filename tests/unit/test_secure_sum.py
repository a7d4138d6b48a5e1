"""The secure sum: exact whatever drops out, private below the threshold, linear cost, refusals.

Statistical checks have fixed keys, reject correct behaviour with probability at most 1e-6, and are also run
on a wrong version, which they must reject.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedsim import seeds
from fedsim.secure_sum import (
    Holder,
    Reveal,
    Ring,
    SafeGraph,
    Server,
    Settings,
    check_threshold,
    neighbourhoods,
    safe_graph,
    shamir,
)
from fedsim.secure_sum import arrays as messages
from fedsim.secure_sum import keys as secure_keys
from fedsim.secure_sum.graph import corrupt_neighbours, width
from fedsim.secure_sum.protocol import DEALT_BYTES, TAG_BYTES, graph_of, pair_key, share_commitment
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
@given(holders=st.integers(2, 50), data=st.data())
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
    holders = 120
    common = agreed(holders, degree=24, threshold=13)
    values = draw_values(common)
    total, server = run(common, values, dict.fromkeys(range(0, holders, 5), stage))
    assert all(len(n) == 24 for n in server.neighbours.values())
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


def flipped(told: Reveal, owner: int, limb: int = 4, bit: int = 7) -> Reveal:
    """A reveal with one bit of the share of one owner flipped."""

    def changed(shares: Mapping[int, NDArray[np.uint32]]) -> dict[int, NDArray[np.uint32]]:
        out = {other: share.copy() for other, share in shares.items()}
        if owner in out:
            out[owner][limb] ^= np.uint32(1 << bit)
        return out

    return Reveal(changed(told.seeds), changed(told.keys))


@pytest.mark.parametrize("silent", [(), (6,)], ids=["seed", "mask key"])
def test_a_flipped_bit_of_any_share_is_named_and_made_up_for(silent: tuple[int, ...]) -> None:
    """Eight holders of threshold four: three of the seven shares of a secret may be damaged."""
    common = agreed(8)
    values = draw_values(common)
    server = before_reveal(common, values, silent)
    here = [h for h in range(8) if h not in silent]
    told = {h: reveal(speakers(common)[h], server) for h in here}
    exact = values[here].sum(axis=0)
    owner = silent[0] if silent else 2
    most = len(here) - (owner in here) - common.threshold  # surplus shares
    for limb, bit in [(0, 0), (3, 30), (8, 31)]:
        bad = [h for h in here if h != owner][:most]
        spoiled = {h: flipped(r, owner, limb, bit) if h in bad else r for h, r in told.items()}
        assert np.array_equal(server.total(spoiled), exact)
        assert server.damaged == [(h, owner) for h in bad]
    bad = [h for h in here if h != owner][: most + 1]
    what = "mask key" if silent else "seed"
    words = rf"3 shares of holder {owner}'s {what} came, 4 are needed. Those of holders \{bad} were damaged"
    with pytest.raises(RunError, match=words.replace("]", "\\]")):
        server.total({h: flipped(r, owner) if h in bad else r for h, r in told.items()})
    assert np.array_equal(server.total(told), exact)
    assert server.damaged == []


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(2, 9), st.integers(0, 3), st.data())
def test_any_flipped_bit_leaves_the_sum_exact_or_refused(
    holders: int, faults: int, data: st.DataObject
) -> None:
    """With and without surplus shares, of both kinds: never another sum."""
    common = agreed(holders, threshold=data.draw(st.integers((holders - 1) // 2 + 1, holders - 1)))
    most = holders - 1 - common.threshold
    gone = data.draw(st.integers(0, min(1, most)))
    values, silent = draw_values(common), range(holders - gone, holders)
    server = before_reveal(common, values, silent)
    told = {h: reveal(speakers(common)[h], server) for h in range(holders - gone)}
    for _ in range(faults):
        by = data.draw(st.sampled_from(sorted(told)))
        owner, limb, bit = (data.draw(st.integers(0, top)) for top in (holders - 1, shamir.LIMBS - 1, 31))
        told[by] = flipped(told[by], owner, limb, bit)
    with contextlib.suppress(RunError):
        assert np.array_equal(server.total(told), values[: holders - gone].sum(axis=0))
    if faults <= most - gone:
        server.total(told)  # enough good shares of everything are left


def test_shares_that_do_not_give_what_was_advertised_are_refused() -> None:
    """A holder that deals shares of other secrets, with commitments that fit them, is named."""
    common = agreed(5)
    secrets = [seeds.derive(7, "seed"), seeds.derive(7, "key")]
    dealt = dict(zip((0, 1, 2, 4), shamir.share(secrets, np.array([1, 2, 3, 5]), 3, bytes(32)), strict=True))
    for kind, silent in (("seed", ()), ("mask key", (3,))):
        server = before_reveal(common, draw_values(common), silent)
        server._promised[3] = {by: b"".join(share_commitment(s) for s in pair) for by, pair in dealt.items()}
        told = {}
        for h in set(range(5)) - set(silent):
            honest = reveal(speakers(common)[h], server)
            both = ({**honest.seeds}, {**honest.keys})
            if h != 3:
                both[len(silent)][3] = dealt[h][len(silent)]
            told[h] = Reveal(*both)
        with pytest.raises(RunError, match=f"shares that holder 3 dealt do not give its {kind}"):
            server.total(told)
        assert server.damaged == []


@pytest.mark.parametrize("bits", [32, 64])
def test_a_sum_beyond_the_bound_is_refused(bits: int) -> None:
    """A vector masked with another mask, or changed on its way, is not a sum of vectors within the bound."""
    common = agreed(4, ring=Ring(bits), bound=1000)
    values = draw_values(common)
    server = before_reveal(common, values)
    told = {h.index: reveal(h, server) for h in speakers(common)}
    exact = server.masked[1].copy()
    for change in (1 << (bits - 2), 1 << (bits - 1), 4001 + 2 * 1000):
        server.masked[1] = exact.copy()
        server.masked[1][3] += np.array(change, dtype=np.uint64).astype(exact.dtype)
        with pytest.raises(RunError, match=r"4 vectors within the bound give at most 4000"):
            server.total(told)
    server.masked[1] = common.ring.encode(values[1], 1000)
    with pytest.raises(RunError, match="masked with another mask"):
        server.total(told)


def test_a_share_that_was_changed_on_its_way_is_left_out_and_named() -> None:
    common = agreed(8)
    values = draw_values(common)
    server = before_reveal(common, values)
    text = server.sealed[2][0]
    server.sealed[2][0] = text[:-1] + bytes([text[-1] ^ 1])
    server.sealed[4][0], server.sealed[5][0] = server.sealed[5][0], server.sealed[4][0]
    told = {h.index: reveal(h, server) for h in speakers(common)}
    assert set(told[0].seeds) == {1, 3, 6, 7}
    assert np.array_equal(server.total(told), values.sum(axis=0))
    assert server.damaged == [(0, 2), (0, 4), (0, 5)]


def test_an_advert_that_was_changed_on_its_way_is_refused_by_its_holder() -> None:
    common = agreed(4)
    holders = speakers(common)
    adverts = {h.index: h.advertise() for h in holders}
    forged = speakers(common, seed=6)[0].advertise()
    for part in ("channel", "mask", "seed"):
        lie = {**adverts, 0: dataclasses.replace(adverts[0], **{part: getattr(forged, part)})}
        with pytest.raises(RunError, match="the advert of holder 0 was changed"):
            holders[0].share(lie)
    with pytest.raises(RunError, match="the advert of holder 0 was changed"):
        holders[0].share({h: a for h, a in adverts.items() if h})
    bad = {**adverts, 2: dataclasses.replace(adverts[2], channel=bytes(32))}
    with pytest.raises(RunError, match="holder 2: a public key of the secure sum is not valid"):
        holders[0].share(bad)


def stories(
    common: Settings, values: NDArray[np.int64], told: Mapping[int, Sequence[int]]
) -> tuple[Server, dict[int, Reveal]]:
    """What a server collects that tells each holder its own story of whose vectors arrived."""
    server, holders = before_reveal(common, values), speakers(common)
    said = {h: holders[h].confirm(server.adverts, server.sealed, story) for h, story in told.items()}
    server.confirmed = said
    reveals = {}
    for h, story in told.items():
        with contextlib.suppress(RunError):
            reveals[h] = reveal(holders[h], server, story)
    return server, reveals


def test_no_holder_loses_both_secrets_to_a_server_that_tells_two_stories() -> None:
    """Some neighbours are told that the victim's vector arrived, the others that it did not."""
    for holders in range(4, 12):
        common, closest = agreed(holders), 0
        everyone, others = list(range(holders)), list(range(1, holders))
        for cut in range(holders):
            told = {0: everyone} | {h: everyone if h <= cut else others for h in others}
            reveals = stories(common, draw_values(common), told)[1].values()
            lost = min(sum(0 in r.seeds for r in reveals), sum(0 in r.keys for r in reveals))
            closest = max(closest, lost)
            assert lost < common.threshold, "at most one secret of the victim can be rebuilt"
        assert closest == common.threshold - 1, "with one share less needed, both could"


def test_masks_between_holders_that_reveal_stay_whatever_each_was_told() -> None:
    """Each is told that only itself and the victim arrived: without confirmations every pair mask falls."""
    common = agreed(9)
    victim, values = 0, draw_values(common)
    told = {h: [victim, h] for h in range(1, 9)} | {victim: [victim, 1]}
    server, reveals = stories(common, values, told)
    assert all(h == victim for h in reveals), "nobody else has enough neighbours that say it is in the sum"
    keys_lost = dict.fromkeys(range(1, 9), 0)
    for h in range(1, 9):
        forged = {o: speakers(common)[o]._confirmation(server.adverts, o, h) for o in range(9) if o != h}
        inbound = server.inbound(h)
        given = speakers(common)[h].unmask(server.adverts, server.sealed, told[h], inbound, forged)
        for other in given.keys:
            keys_lost[other] += 1
    assert min(keys_lost.values()) >= common.threshold, "had they been confirmed, every mask had fallen"


def test_confirmations_of_others_sessions_and_pairs_do_not_count() -> None:
    common = agreed(5)
    server = before_reveal(common, draw_values(common))
    holder = speakers(common)[0]
    fair = server.confirmations(0)
    assert len(fair) == 4
    for lie in (
        {},
        {o: bytes(len(tag)) for o, tag in fair.items()},
        {o: server.confirmed[o][(o % 4) + 1] if (o % 4) + 1 != o else bytes(16) for o in fair},
        {o: server.confirmed[0][o] for o in fair},
        {o: speakers(common, 6)[o]._confirmation(server.adverts, o, 0) for o in fair},
        dict(list(fair.items())[: common.threshold - 1]),
    ):
        with pytest.raises(RunError, match="neighbours confirm that holder 0 is in the sum"):
            holder.unmask(server.adverts, server.sealed, server.masked, server.inbound(0), lie)
    assert len(reveal(holder, server).seeds) == 4


@pytest.mark.parametrize(
    ("holders", "degree", "corrupt"), [(10, 9, 0.0), (10, 8, 0.0), (10, 9, 0.2), (300, 40, 0.05)]
)
def test_thresholds_stand_two_stories_with_the_corrupt_neighbours(
    holders: int, degree: int, corrupt: float
) -> None:
    """2 t > m + c at the least threshold that is accepted, and one less is refused with the reason."""
    near, bad = width(holders, degree), corrupt_neighbours(holders, degree, corrupt)
    if near == holders - 1:
        assert bad == int(corrupt * holders)
    else:
        law = stats.hypergeom(holders - 1, int(corrupt * holders), near)
        assert holders * law.sf(bad) <= 2.0**-41 < holders * law.sf(bad - 1)
    least = next(t for t in range(near + 1) if 2 * t > near + bad)
    check_threshold(holders, SafeGraph(degree, least), corrupt)
    with pytest.raises(InputError, match=f"at least {least}, more than half .* different stories"):
        check_threshold(holders, SafeGraph(degree, least - 1), corrupt)
    for n, dropped in ((holders, 0.3), (2, 0.3), (3, 0.3), (7, 0.3)):
        graph = safe_graph(n, corrupt, dropped)
        check_threshold(n, graph, corrupt)
        assert graph.threshold <= width(n, graph.degree)


def test_masks_of_steps_holders_pairs_and_purposes_differ() -> None:
    """Sessions have nothing in common: no key, no commitment, no mask, no share."""
    common = agreed(4, length=64)
    seen: list[bytes] = []
    for session in range(12):
        holders = speakers(common, seed=100 + session)
        adverts = {h.index: h.advertise() for h in holders}
        for h in holders:
            seen += [adverts[h.index].channel, adverts[h.index].mask, adverts[h.index].seed]
            seen += list(h.share(adverts).values())
            seen += list(h.confirm(adverts, range(4), range(4)).values())
            seen += [pair_key(h._private("mask"), adverts[o].mask, h.index, o) for o in range(h.index)]
            seen.append(h.mask(np.zeros(64, dtype=np.int64), adverts, range(4)).tobytes())
    assert len(set(seen)) == len(seen)


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
