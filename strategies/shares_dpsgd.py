"""DP-SGD with noise in shares under a secure sum: nobody ever holds the exact sum.

Who is trusted: the server to follow the protocol (it may look at everything, and lies about who dropped out
do not help it), and all but a stated share of the holders not to work with it. What is sent: each holder
clips and sums its drawn examples, rotates, scales and rounds the sum to integers, adds its share of integer
noise, and masks the result (fedsim.secure_sum); the server learns the sum over all holders, noise included.
Where noise is added: at every holder, a share of it, sized so that any `min_survivors` shares make the full
noise. Unit: example. Event: RenyiGaussian, Poisson sampled, one a step, with the effective noise multiplier
of the rounded mechanism (fedsim.privacy.discrete; proved for whole Renyi orders, so every accountant answers
with those and privacy loss distributions are not used). `plan.noise` is the target: the noise before rounding
costs that `min_survivors` holders give together.

Dropout policy: holders may go silent before any of the five stages. With fewer inputs than `min_survivors`
the step is refused before anything is unmasked, or the server tops the noise up (`on_shortfall`): the
released sum is then as private as stated for everybody but the server, which for that step is trusted with
its own part of the noise. Too few shares to unmask: refused. A share that comes back changed is named in the
ledger and made up for by the others; a sum longer than its clipped parts and their noise is refused. More
survivors than the minimum add more noise than the event counts on. The ledger notes survivors and the noise
that was really added. A holder that works with the server can take its own noise away: for privacy against c
such holders set min_survivors c below those who surely stay.

What is simulated: secrets of holders (mask keys, noise, rounding, dropouts, and the draw of examples, which
must be hidden from the server for amplification to hold against it) follow from step keys that travel in the
task, so that any process can serve any node and a repeated step sends the same messages. In a deployment each
holder has its own secret; the messages stay as they are. A node tells and hears one story a step
(fedsim.engine.asked).

Source: Agarwal, Kairouz, Liu 2021 (Skellam); Kairouz, Liu, Steinke 2021 (rotation, discrete Gaussian);
Bonawitz et al. 2017 and Bell et al. 2020 (secure sum).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import secure_sum, seeds, validate
from fedsim.config import Config
from fedsim.grads.clip import ClipRule
from fedsim.noise import discrete
from fedsim.noise.gaussian import GaussianNoise
from fedsim.noise.shares import NoiseShares, Quantiser
from fedsim.privacy import events
from fedsim.privacy.budget import within_budget
from fedsim.privacy.discrete import IntegerMechanism
from fedsim.privacy.family import EventFamily
from fedsim.sampling import sampling_rate
from fedsim.secure_sum import arrays as messages
from fedsim.secure_sum import shamir
from fedsim.secure_sum.protocol import DEALT_BYTES, SEALED_BYTES, TAG_BYTES, graph_of
from fedsim.seeds import Root, derive
from fedsim.strategies.base import ENGINE_SETTINGS, Ask, DataFacts, NodeView, Plan, Strategy
from fedsim.types import ClippedSum, HolderReply, StepTask
from fedsim.validate import InputError, RunError
from fedsim.visibility import Public

STAGES = ("advertise", "share", "", "confirm", "unmask")
ROUNDING = 1e-3  # relative slack on the norm of sums of many float32 terms
_log = logging.getLogger(__name__)
_WANTED = 0.995  # effective / real noise multiplier at which a finer scale is no longer worth its bits
_LEAST = 0.9  # below this the rounding costs more than it should: the ring is too small
_UNITS = 5.0  # wanted noise / (ring unit * root of the holders): rounding then adds under 1% of its variance


@dataclass(frozen=True)
class SharesOptions:
    """Options of shares_dpsgd.

    Attributes:
        min_survivors: holders whose shares together are the full noise; null: all of them.
        on_shortfall: with fewer, "refuse" the step or "top_up" the noise at the server.
        dropout_rate: simulated chance of a holder to go silent in a step, before a random stage.
        noise: "skellam" or "discrete_gaussian".
        ring_bits: 32 or 64; null: 32 where the sum fits.
        rotate: spread every vector over its coordinates first, which needs fewer bits.
        corrupt: share of holders that may work with the server; the masks stand that many.
        tolerated_dropouts: share of holders that may go silent without stopping the secure sum.
        neighbours, threshold: of the secret sharing, both or neither; null: from the two shares above.
    """

    min_survivors: int | None = None
    on_shortfall: str = "refuse"
    dropout_rate: float = 0.0
    noise: str = "skellam"
    ring_bits: int | None = None
    rotate: bool = True
    corrupt: float = 0.05
    tolerated_dropouts: float = 0.3
    neighbours: int | None = None
    threshold: int | None = None


@dataclass(frozen=True)
class Setup:
    """What server and holders must agree on; the server makes it and sends it along with every stage."""

    settings: secure_sum.Settings
    quantiser: Quantiser
    shares: NoiseShares

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return what a node cannot derive from the configuration."""
        whole = [self.settings.bound, self.settings.ring.bits, self.quantiser.length]
        real = [self.quantiser.scale, self.shares.variance]
        return {"whole": np.array(whole, dtype=np.int64), "real": np.array(real, dtype=np.float64)}


class SharesDPSGD(Strategy[SharesOptions]):
    Options = SharesOptions
    private = True
    trusted = "server to follow the protocol (sees only the noisy sum), most holders not to work with it"
    sent = "masked, rounded sum of clipped per-example gradients with a share of the noise, a holder"
    noise_added = "every holder, a share of it, as integers"
    stages = STAGES
    simulates_secrets = True
    sums_by_holder = True
    dropout_policy = "below min_survivors: refuse the step, or top up the noise; below the threshold: refuse"

    def __init__(self, config: Config, options: SharesOptions) -> None:
        super().__init__(config, options)
        validate.one_of(options.on_shortfall, ("refuse", "top_up"), "strategy.options.on_shortfall")
        validate.in_range(options.dropout_rate, 0.0, 1.0, "strategy.options.dropout_rate")
        validate.one_of(options.noise, discrete.KINDS, "strategy.options.noise")
        validate.one_of(options.ring_bits, (None, 32, 64), "strategy.options.ring_bits")
        if (options.neighbours is None) != (options.threshold is None):
            validate.conflicts(
                "strategy.options.neighbours and threshold must be given together.",
                "Give both, or neither to have them computed from corrupt and tolerated_dropouts.",
            )
        self._setup: Setup | None = None
        self._survivors = 0
        self._damaged: list[tuple[int, int]] = []

    @property
    def _least(self) -> int:
        holders, wanted = self.config.federation.holders, self.options.min_survivors
        return holders if wanted is None else wanted

    def plan(self, facts: DataFacts) -> Plan:
        if not self.config.engine.deterministic:
            validate.conflicts(
                "engine.deterministic is false, but a stage of the secure sum that is asked again must mask "
                "the very integers it masked before.",
                "Use engine.deterministic=true.",
            )
        privacy, train = self.config.privacy, self.config.train
        rate = sampling_rate(train.expected_batch_size, facts.examples, self.config.federation.availability)
        family = EventFamily(lambda effective: events.renyi_gaussian_step(effective, rate))
        if privacy.target_epsilon is None and privacy.noise_multiplier is not None:
            self._setup, mechanism = self._scaled(privacy.noise_multiplier, facts)
            effective = mechanism.effective_noise_multiplier()
            privacy = dataclasses.replace(privacy, noise_multiplier=effective)
            budget = within_budget(privacy, family, train.steps)
        else:
            budget = within_budget(privacy, family, train.steps)
            self._setup, mechanism = self._with_effective(budget.noise_multiplier, facts)
        return Plan(
            unit="example",
            sampling_rate=rate,
            divisor=train.expected_batch_size,
            clip=self.clip_rule(),
            noise=GaussianNoise(mechanism.noise_multiplier, self.clip_rule().sensitivity),
            budget=budget,
        )

    def _with_effective(self, wanted: float, facts: DataFacts) -> tuple[Setup, IntegerMechanism]:
        """Return the mechanism whose effective noise multiplier is just at least `wanted`."""
        multiplier = wanted
        while True:  # effective / real is at least _LEAST and grows with the noise: a few rounds
            setup, mechanism = self._scaled(multiplier, facts)
            effective = mechanism.effective_noise_multiplier()
            if effective >= wanted:
                return setup, mechanism
            multiplier *= wanted / effective * (1.0 + 1e-9)

    def _scaled(self, multiplier: float, facts: DataFacts) -> tuple[Setup, IntegerMechanism]:
        """Return the coarsest scale (a power of two) at which rounding costs almost nothing, or the finest
        that fits the ring.

        Raises:
            InputError: the ring is too small for the sum at any scale that is fine enough.
        """
        # What does not depend on the scale is refused first, in its own words.
        shares = NoiseShares(1.0, facts.holders, self._least, self.options.noise)
        self._agreed(Quantiser(1, 1.0), shares, secure_sum.Ring(64), 1)
        best: tuple[Setup, IntegerMechanism] | None = None
        refusal: InputError | None = None
        for exponent in range(63):
            mechanism = self._mechanism(multiplier, 2.0**exponent, facts)
            try:
                setup = self._setup_at(mechanism, facts)
            except InputError as error:
                refusal = error
                break
            best = setup, mechanism
            if _efficiency(mechanism) >= _WANTED and _fineness(mechanism) >= _UNITS:
                return best
        if best is None or _efficiency(best[1]) < _LEAST or _fineness(best[1]) < 1.0:
            raise InputError(
                f"strategy.options: no scale fits. {refusal} At the finest scale that fits, rounding would "
                "cost more than a tenth of the noise multiplier, or be larger than the noise."
            )
        return best

    def _mechanism(self, multiplier: float, units: float, facts: DataFacts) -> IntegerMechanism:
        dimension = Quantiser(facts.parameters, 1.0, self.options.rotate).dimension
        return IntegerMechanism(
            multiplier, units, dimension, self.options.noise, facts.holders, min(self._least, facts.holders)
        )

    def _setup_at(self, mechanism: IntegerMechanism, facts: DataFacts) -> Setup:
        options, holders, sensitivity = self.options, facts.holders, self.clip_rule().sensitivity
        quantiser = Quantiser(facts.parameters, mechanism.units / sensitivity, options.rotate)
        shares = NoiseShares(mechanism.variance, holders, self._least, options.noise)
        bound = quantiser.bound(facts.most_of_a_holder * sensitivity, holders) + shares.bound(
            quantiser.dimension
        )
        bits = options.ring_bits or (32 if bound * holders < secure_sum.Ring(32).half else 64)
        return self._agreed(quantiser, shares, secure_sum.Ring(bits), bound)

    @functools.cached_property
    def _graph(self) -> secure_sum.SafeGraph:
        """Who exchanges masks. Server and nodes find it for themselves: a threshold that somebody else
        chooses is no protection."""
        options, holders = self.options, self.config.federation.holders
        if options.neighbours is None or options.threshold is None:
            return secure_sum.safe_graph(holders, options.corrupt, options.tolerated_dropouts)
        graph = secure_sum.SafeGraph(options.neighbours, options.threshold)
        secure_sum.check_threshold(holders, graph, options.corrupt)
        return graph

    def _agreed(self, quantiser: Quantiser, shares: NoiseShares, ring: secure_sum.Ring, bound: int) -> Setup:
        graph = self._graph
        least = max(2, self._least if self.options.on_shortfall == "refuse" else 2)
        settings = secure_sum.Settings(
            shares.holders, graph.degree, graph.threshold, least, bound, ring, quantiser.dimension
        )
        return Setup(settings, quantiser, shares)

    def _from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> Setup:
        bound, bits, length = arrays["whole"].tolist()
        scale, variance = arrays["real"].tolist()
        return self._agreed(
            Quantiser(length, scale, self.options.rotate),
            NoiseShares(variance, self.config.federation.holders, self._least, self.options.noise),
            secure_sum.Ring(bits),
            bound,
        )

    def keys(self, root: Root, step: int) -> dict[str, bytes]:
        own = {purpose: derive(root, purpose, step) for purpose in ("holders", "dropouts")}
        return {**super().keys(root, step), **own, "rotation": self._signs(step)}

    def _here(self, node: NodeView, task: StepTask) -> NDArray[np.bool_]:
        """Say which holders of the node still answer at the task's stage, (H,)."""
        online = np.isin(node.holders, node.online(node.holders, task))
        if self.options.dropout_rate == 0.0:
            return online
        last = int(node.holders.max()) + 1
        chance = seeds.words(task.keys["dropouts"], 0, last)[node.holders].astype(np.float64) * 2.0**-64
        before = seeds.words(derive(task.keys["dropouts"], "stage"), 0, last)[node.holders] % np.uint64(5)
        silent = (chance < self.options.dropout_rate) & (before <= STAGES.index(task.stage))
        return online & ~silent

    def answer(self, node: NodeView, task: StepTask) -> tuple[dict[str, NDArray[Any]], ClippedSum]:
        """Speak for those holders of the node that still answer, one row each."""
        setup, here, sent = self._from_arrays(task.arrays), self._here(node, task), task.arrays
        rows, width = node.holders.tolist(), setup.settings.width
        speakers = {
            rows[i]: secure_sum.Holder(
                rows[i], setup.settings, derive(task.keys["holders"], "session", rows[i])
            )
            for i in np.flatnonzero(here)
        }
        nothing = _no_sum(self.clip_rule())
        if task.stage == "advertise":
            public = {h: speaker.advertise() for h, speaker in speakers.items()}
            return {"here": here, "public": messages.pack_adverts(public, rows)}, nothing
        everyone = np.arange(setup.settings.holders)
        adverts = messages.unpack_adverts(sent["public"], sent["advertised"], everyone)
        graph = graph_of(setup.settings, adverts)
        if task.stage == "share":
            dealt = {h: speaker.share(adverts) for h, speaker in speakers.items()}
            packed = messages.pack_pairs(dealt, graph, rows, width, DEALT_BYTES)
            return {"here": here, "dealt": packed}, nothing
        shared = set(np.flatnonzero(sent["shared"]).tolist())
        if task.stage == "confirm":
            arrived = set(np.flatnonzero(sent["arrived"]).tolist())
            told = {h: speaker.confirm(adverts, shared, arrived) for h, speaker in speakers.items()}
            packed = messages.pack_pairs(told, graph, rows, width, TAG_BYTES)
            return {"here": here, "confirmations": packed}, nothing
        if task.stage == "unmask":
            arrived = set(np.flatnonzero(sent["arrived"]).tolist())
            sealed = messages.unpack_pairs(sent["sealed"], sent["shared"], everyone, graph)
            said = messages.unpack_pairs(sent["confirmations"], sent["confirmed"], everyone, graph, arrived)
            inbound, confirmed = messages.by_receiver(sealed), messages.by_receiver(said)
            reveals = {
                h: speaker.unmask(adverts, shared, arrived, inbound.get(h, {}), confirmed.get(h, {}))
                for h, speaker in speakers.items()
            }
            return {"here": here, "shares": messages.pack_reveals(reveals, graph, rows, width)}, nothing
        masked = np.zeros((len(rows), setup.settings.length), dtype=setup.settings.ring.dtype)
        ids = node.drawn(task)
        exact, together = node.clipped_sums(
            ids[np.isin(node.owners(ids), node.holders[here])], task, self.clip_rule()
        )
        for row, holder in enumerate(rows):
            if holder in speakers:
                vector = exact[row].cpu().numpy()
                values = self._values(vector, setup, holder, task)
                masked[row] = speakers[holder].mask(values, adverts, shared)
        return {"here": here, "masked": masked}, together

    def _values(self, vector: NDArray[Any], setup: Setup, holder: int, task: StepTask) -> NDArray[np.int64]:
        """Return a holder's rounded sum with its share of the noise, int64 (D,)."""
        key = task.keys["holders"]
        values = setup.quantiser.encode(vector, task.keys["rotation"], derive(key, "dither", holder))
        values += setup.shares.sample(derive(key, "noise share", holder), len(values))
        return values

    def _signs(self, step: int) -> bytes:
        """The key of the rotation: public, and apart from all data."""
        return derive(self.config.seed, "rotation", step)

    def collect(self, plan: Plan, ask: Ask) -> tuple[NDArray[np.float64], list[HolderReply]]:
        """Run the five stages and return the decoded sum, noise included, with the replies of the third."""
        assert self._setup is not None
        setup, width = self._setup, self._setup.settings.width
        everyone = list(range(setup.settings.holders))
        server = secure_sum.Server(setup.settings)
        along = setup.to_arrays()

        adverts: dict[int, secure_sum.Advert] = {}
        for r in ask("advertise", along):
            adverts |= messages.unpack_adverts(r.arrays["public"], r.arrays["here"], r.holders)
        self._check(setup, len(adverts))
        server.take_adverts(adverts)
        along |= {"advertised": _mask(adverts, everyone), "public": messages.pack_adverts(adverts, everyone)}

        dealt: dict[int, dict[int, bytes]] = {}
        for r in ask("share", along):
            dealt |= messages.unpack_pairs(r.arrays["dealt"], r.arrays["here"], r.holders, server.neighbours)
        self._check(setup, len(dealt))
        server.take_shares(dealt)
        along |= {"shared": _mask(server.sealed, everyone)}

        replies = ask("", along)
        masked: dict[int, NDArray[Any]] = {}
        for r in replies:
            masked |= {int(r.holders[i]): r.arrays["masked"][i] for i in np.flatnonzero(r.arrays["here"])}
        self._check(setup, len(masked))
        server.take_masked(masked)
        self._survivors = len(server.masked)
        along |= {"arrived": _mask(server.masked, everyone)}

        confirmed: dict[int, dict[int, bytes]] = {}
        near, shared, arrived = server.neighbours, set(server.sealed), set(server.masked)
        for r in ask("confirm", along):
            here, said = r.arrays["here"], r.arrays["confirmations"]
            confirmed |= messages.unpack_pairs(said, here, r.holders, near, arrived)
        server.take_confirmations(confirmed)
        along |= {
            "confirmed": _mask(server.confirmed, everyone),
            "confirmations": messages.pack_pairs(server.confirmed, near, everyone, width, TAG_BYTES),
            "sealed": messages.pack_pairs(server.sealed, near, everyone, width, SEALED_BYTES),
        }

        reveals: dict[int, secure_sum.Reveal] = {}
        for r in ask("unmask", along):
            here, shares = r.arrays["here"], r.arrays["shares"]
            reveals |= messages.unpack_reveals(shares, here, r.holders, near, shared, arrived)
        total = server.total(reveals)
        self._check_size(setup, total, sum(r.count for r in replies))
        self._damaged = server.damaged
        for by, owner in server.damaged:
            _log.warning("holder %d revealed another share than holder %d dealt it", by, owner)
        return setup.quantiser.decode(total, self._signs(replies[0].step)), replies

    def _check_size(self, setup: Setup, total: NDArray[np.int64], count: int) -> None:
        """Refuse a sum longer than `count` clipped examples, the rounding and the noise can make it."""
        root = math.sqrt(len(total))
        clipped = count * self.clip_rule().sensitivity * setup.quantiser.scale
        noise = setup.shares.norm_bound(len(total), self._survivors)
        limit = clipped * (1.0 + ROUNDING) + self._survivors * root + noise
        if (norm := float(np.linalg.norm(total.astype(np.float64)))) > limit:
            raise RunError(
                f"the secure sum has norm {norm:.6g} in ring units, above {limit:.6g}, which {count} clipped "
                "examples, the rounding and the noise give at most: a masked vector was changed, or not "
                "clipped."
            )

    def _check(self, setup: Setup, left: int) -> None:
        if self.options.on_shortfall == "refuse":
            setup.shares.refuse_shortfall(left)

    def noise(self, plan: Plan, root: Root, step: int, count: int) -> NDArray[np.float64] | None:
        """Return what the survivors' noise lacks where the server tops it up, else None."""
        assert self._setup is not None
        shares, quantiser = self._setup.shares, self._setup.quantiser
        lacking = shares.min_survivors - self._survivors
        if lacking <= 0:
            return None
        # Share by share: what is proved of sums of discrete Gaussians is for equal ones.
        values = np.zeros(quantiser.dimension, dtype=np.int64)
        for i in range(lacking):
            values += shares.sample(derive(root, "top up", step, i), quantiser.dimension)
        return quantiser.decode(values, self._signs(step))

    def noise_std_of_sum(self, plan: Plan) -> float:
        assert plan.noise is not None
        return plan.noise.noise_std * math.sqrt(self.config.federation.holders / self._least)

    def step_facts(self) -> dict[str, Public[Any]]:
        """Return survivors, the standard deviation of the noise of the holders and of the server, and the
        (revealing, dealing) holders of damaged shares where there were any; none depends on data."""
        assert self._setup is not None
        shares, scale = self._setup.shares, self._setup.quantiser.scale
        damaged = [list(pair) for pair in self._damaged]
        return {
            "survivors": Public(self._survivors),
            "noise_std_of_holders": Public(math.sqrt(shares.realised(self._survivors)) / scale),
            "noise_std_of_server": Public(math.sqrt(shares.missing(self._survivors)) / scale),
            **({"damaged_shares": Public(damaged)} if damaged else {}),
        }

    def reply_arrays(
        self, reply: HolderReply, parameters: int, dtype: np.dtype[Any]
    ) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        assert self._setup is not None
        s, rows, width = self._setup.settings, len(reply.holders), self._setup.settings.width
        byte = np.dtype(np.uint8)
        body: dict[str, dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = {
            "advertise": {"public": ((rows, 3, 32), byte)},
            "share": {"dealt": ((rows, width, DEALT_BYTES), byte)},
            "": {"masked": ((rows, s.length), s.ring.dtype)},
            "confirm": {"confirmations": ((rows, width, TAG_BYTES), byte)},
            "unmask": {"shares": ((rows, width, shamir.LIMBS), np.dtype(np.uint32))},
        }
        return {"here": ((rows,), np.dtype(np.bool_)), **body[reply.stage]}

    def counted_at_most(self, task: StepTask, holders: NDArray[np.int64], ids: NDArray[np.int64]) -> int:
        return super().counted_at_most(task, holders, ids) if task.stage == "" else 0

    def node_traffic(self, parameters: int, dtype: np.dtype[Any], holders: int) -> tuple[int, int]:
        assert self._setup is not None
        received, sent = super().node_traffic(parameters, dtype, holders)
        everyone = self.config.federation.holders  # whose messages pass through the server
        adverts, confirmed = (
            self._reply_bytes(s, parameters, dtype, everyone) for s in ("advertise", "confirm")
        )
        sealed = everyone * (1 + self._setup.settings.width * SEALED_BYTES)
        return received + 4 * adverts + confirmed + sealed, sent

    def unread(self) -> tuple[str, ...]:
        return ENGINE_SETTINGS

    def traffic(self, facts: DataFacts, itemsize: int) -> tuple[float, int]:
        assert self._setup is not None
        s, width = self._setup.settings, self._setup.settings.width
        up = 96 + width * (DEALT_BYTES + TAG_BYTES + 4 * shamir.LIMBS)
        protocol = up + width * (96 + SEALED_BYTES + TAG_BYTES)
        vectors = facts.parameters * itemsize + s.length * s.ring.bits // 8
        return float(vectors + protocol), 2 * len(STAGES) * self.config.federation.nodes

    def survivors_needed(self) -> str:
        return f"{self._least} of {self.config.federation.holders}"


def _efficiency(mechanism: IntegerMechanism) -> float:
    return mechanism.effective_noise_multiplier() / mechanism.noise_multiplier


def _fineness(mechanism: IntegerMechanism) -> float:
    """Noise in units of the rounding of all holders: one unit each, so its root."""
    return math.sqrt(mechanism.variance / mechanism.shares)


def _mask(present: Mapping[int, Any], everyone: list[int]) -> NDArray[np.bool_]:
    return np.array([holder in present for holder in everyone])


def _no_sum(clip: ClipRule) -> ClippedSum:
    empty = torch.zeros(0, dtype=torch.float64)
    return ClippedSum(empty, 0, clip.sensitivity, empty, empty)


STRATEGY = SharesDPSGD
