"""Noise in shares under a secure sum: nobody ever holds the exact sum.

Who is trusted: the server to follow the protocol (it may look at everything, and lies about who dropped out
do not help it), and all but a stated share of the holders not to work with it. What is sent: each holder
clips and sums its drawn contributions, rotates, scales and rounds the sum to integers, adds its share of
integer noise, and masks the result (fedsim.secure_sum); the server learns the sum over all holders, noise
included. Where noise is added: at every holder, a share of it, sized so that any `min_survivors` shares make
the full noise. Unit: that of the query; for a whole holder (distributed DP-FedAvg) the events bound "takes
part with an update" against "takes part with none", because its masks and its share of the noise leave with
it. Event: RenyiGaussian, sampled as the sampler says, with the effective noise multiplier of the rounded
mechanism (fedsim.privacy.discrete; proved for whole Renyi orders, so every accountant answers with those and
privacy loss distributions are not used). `Release.noise_stds` are the target: the noise before rounding costs
that `min_survivors` holders give together.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dp_accounting
import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import secure_sum, seeds, validate
from fedsim.clipping.base import ClipRule
from fedsim.noise import discrete
from fedsim.privacy import events, masked_sum
from fedsim.privacy.budget import within_budget
from fedsim.privacy.family import EventFamily
from fedsim.privacy.masked_sum import MaskedSum, Terms, Vector
from fedsim.queries import Statistic
from fedsim.queries.base import Arrays, NodeView
from fedsim.queries.statistic import Expected
from fedsim.rules import ENGINE_SETTINGS
from fedsim.samplers import Participation
from fedsim.secure_sum import shamir
from fedsim.secure_sum.conversation import STAGES, Speakers, expected, summed
from fedsim.secure_sum.protocol import DEALT_BYTES, SEALED_BYTES, TAG_BYTES
from fedsim.seeds import Root, derive
from fedsim.strategies import STRATEGIES
from fedsim.strategies.base import (
    Agreed,
    Ask,
    Collected,
    DataFacts,
    Noise,
    Phase,
    Release,
    Setting,
    Split,
    Sums,
    Trust,
    Units,
)
from fedsim.types import ClippedSum, HolderReply, StepTask
from fedsim.validate import RunError
from fedsim.visibility import Public

ROUNDING = 1e-3  # relative slack on the norm of sums of many float32 terms
_log = logging.getLogger(__name__)


@STRATEGIES.register("shares")
@dataclass(frozen=True)
class Shares(Trust):
    """Holders mask their sums and add shares of the noise: the server learns the noised sum alone.

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

    trusted = "server to follow the protocol (sees only the noisy sum), most holders not to work with it"
    sent = "masked, rounded sum of clipped {what} with a share of the noise, a holder"
    noise_added = "every holder, a share of it, as integers"
    dropout_policy = "below min_survivors: refuse the step, or top up the noise; below the threshold: refuse"
    stages = STAGES
    simulates_secrets = True
    by_holder = True
    adapts = False
    takes_fixed_size = False
    unread = ENGINE_SETTINGS

    def __post_init__(self) -> None:
        validate.one_of(self.on_shortfall, ("refuse", "top_up"), "strategy.options.on_shortfall")
        validate.in_range(self.dropout_rate, 0.0, 1.0, "strategy.options.dropout_rate")
        validate.one_of(self.noise, discrete.KINDS, "strategy.options.noise")
        validate.one_of(self.ring_bits, (None, 32, 64), "strategy.options.ring_bits")
        if (self.neighbours is None) != (self.threshold is None):
            validate.conflicts(
                "strategy.options.neighbours and threshold must be given together.",
                "Give both, or neither to have them computed from corrupt and tolerated_dropouts.",
            )

    def check(self, at: Setting) -> None:
        """See `Trust.check`."""
        super().check(at)
        if not at.config.engine.deterministic:
            validate.conflicts(
                "engine.deterministic is false, but a stage of the secure sum that is asked again must mask "
                "the very integers it masked before.",
                "Use engine.deterministic=true.",
            )

    def event(self, at: Setting, noise_multiplier: float, taking: Participation) -> dp_accounting.DpEvent:
        """See `Trust.event`; `noise_multiplier` is the effective one."""
        return events.renyi_gaussian_step(noise_multiplier, taking.rate)

    def _least(self, at: Setting) -> int:
        holders = at.config.federation.holders
        return holders if self.min_survivors is None else self.min_survivors

    def _terms(self, at: Setting) -> Terms:
        holders, least = at.config.federation.holders, self._least(at)
        return Terms(
            holders,
            least,
            max(2, least if self.on_shortfall == "refuse" else 2),
            self.noise,
            self.ring_bits,
            self.rotate,
            _graph(holders, self.corrupt, self.tolerated_dropouts, self.neighbours, self.threshold),
        )

    def agree(
        self, at: Setting, family: EventFamily, phases: Sequence[Phase], split: Split, facts: DataFacts
    ) -> Agreed:
        """See `Trust.agree`: a noise multiplier is taken before the cost of rounding, a target met after."""
        privacy, steps, terms = at.config.privacy, at.config.train.steps, self._terms(at)
        most = at.query.most_of_a_holder(facts.most_of_a_holder)
        given = privacy.noise_multiplier if privacy.target_epsilon is None else None
        target = given is None
        if given is None:
            budget = within_budget(privacy, family, steps)
            given = budget.noise_multiplier
        of = masked_sum.with_effective if target else masked_sum.scaled
        found = [
            of(given * factor, terms, _vector(statistic, split(given * factor)), most)
            for statistic, factor in phases
        ]
        if not target:  # what rounding costs the phase that it costs most
            effective = min(
                mechanism.effective_noise_multiplier() / phase.factor
                for (_, mechanism), phase in zip(found, phases, strict=True)
            )
            budget = within_budget(dataclasses.replace(privacy, noise_multiplier=effective), family, steps)
        multipliers = tuple(
            mechanism.noise_multiplier / phase.factor
            for (_, mechanism), phase in zip(found, phases, strict=True)
        )
        return Agreed(budget, multipliers, tuple(setup for setup, _ in found))

    def keys(self, at: Setting, root: Root, step: int) -> dict[str, bytes]:
        """See `Trust.keys`."""
        own = {purpose: derive(root, purpose, step) for purpose in ("holders", "dropouts")}
        return {**own, "rotation": _signs(at, step)}

    def _here(self, node: NodeView, task: StepTask) -> NDArray[np.bool_]:
        """Say which holders of the node still answer at the task's stage, (H,)."""
        online = np.isin(node.holders, node.online(node.holders, task))
        if self.dropout_rate == 0.0:
            return online
        last = int(node.holders.max()) + 1
        chance = seeds.words(task.keys["dropouts"], 0, last)[node.holders].astype(np.float64) * 2.0**-64
        before = seeds.words(derive(task.keys["dropouts"], "stage"), 0, last)[node.holders] % np.uint64(5)
        silent = (chance < self.dropout_rate) & (before <= STAGES.index(task.stage))
        return online & ~silent

    def answer(self, at: Setting, node: NodeView, task: StepTask) -> tuple[Arrays, ClippedSum]:
        """Speak for those holders of the node that still answer, one row each."""
        here = self._here(node, task)
        setup = MaskedSum.from_arrays(task.arrays, self._terms(at))
        speakers = Speakers(setup.settings, task, node.holders, here)
        if task.stage != "":
            return speakers.answer(), _no_sum(at.clip)
        exact, together = at.sums_by_holder(node, task, here)
        return speakers.masked(lambda row, holder: _values(exact[row], setup, holder, task)), together

    def collect(self, at: Setting, release: Release, along: Arrays, ask: Ask) -> Collected:
        """Run the five stages and return the decoded sums, noise included, with the replies of the third."""
        setup: MaskedSum = release.agreed
        got = summed(setup.settings, along | setup.to_arrays(), ask, functools.partial(self._check, setup))
        _check_size(setup, got.total, sum(r.count for r in got.replies), got.survivors)
        for by, owner in got.damaged:
            _log.warning("holder %d revealed another share than holder %d dealt it", by, owner)
        decoded = setup.vector.parts(setup.quantiser.decode(got.total, _signs(at, got.replies[0].step)))
        names = [part.name for part in release.statistic.parts]
        return Collected(
            dict(zip(names, decoded, strict=True)),
            got.replies,
            _facts(setup, got.survivors, got.damaged),
            max(0, setup.shares.min_survivors - got.survivors),
        )

    def _check(self, setup: MaskedSum, left: int) -> None:
        if self.on_shortfall == "refuse":
            setup.shares.refuse_shortfall(left)

    def added(
        self, at: Setting, release: Release, got: Collected, noise: Noise, root: Root, step: int
    ) -> Sums:
        """See `Trust.added`: what the survivors' noise lacks, where the server tops it up."""
        if got.lacking == 0:
            return {}
        setup: MaskedSum = release.agreed
        # Share by share: what is proved of sums of discrete Gaussians is for equal ones.
        values = np.zeros(setup.quantiser.dimension, dtype=np.int64)
        for i in range(got.lacking):
            values += setup.shares.sample(derive(root, "top up", step, i), setup.quantiser.dimension)
        parts = setup.vector.parts(setup.quantiser.decode(values, _signs(at, step)))
        return {part.name: own for part, own in zip(release.statistic.parts, parts, strict=True)}

    def stds_of_sums(self, at: Setting, release: Release) -> dict[str, float]:
        """See `Trust.stds_of_sums`: those who are not needed add theirs too, of those online on average."""
        online = at.config.federation.holders * at.config.federation.availability
        more = math.sqrt(max(1.0, online / self._least(at)))
        return {name: std * more for name, std in release.noise_stds.items()}

    def reply_arrays(self, at: Setting, release: Release, reply: HolderReply) -> Expected:
        """See `Trust.reply_arrays`."""
        return expected(release.agreed.settings, reply.stage, len(reply.holders))

    def norm_bounds(self, at: Setting, release: Release, reply: HolderReply) -> dict[str, float]:
        """See `Trust.norm_bounds`: masked vectors have none; `collect` looks at their sum."""
        return {}

    def counted_at_most(self, at: Setting, task: StepTask, units: Units) -> int:
        """See `Trust.counted_at_most`: only the stage of the sums has counts."""
        return super().counted_at_most(at, task, units) if task.stage == "" else 0

    def node_traffic(self, at: Setting, release: Release, holders: int) -> tuple[int, int]:
        """See `Trust.node_traffic`; much of what holders say passes through the server to others."""
        received, sent = super().node_traffic(at, release, holders)
        everyone = at.config.federation.holders
        adverts, confirmed = (self.reply_bytes(at, release, s, everyone) for s in ("advertise", "confirm"))
        sealed = everyone * (1 + release.agreed.settings.width * SEALED_BYTES)
        return received + 4 * adverts + confirmed + sealed, sent

    def traffic(self, at: Setting, release: Release) -> tuple[float, int]:
        """See `Trust.traffic`."""
        s = release.agreed.settings
        up = 96 + s.width * (DEALT_BYTES + TAG_BYTES + 4 * shamir.LIMBS)
        protocol = up + s.width * (96 + SEALED_BYTES + TAG_BYTES)
        vectors = release.down_bytes(at.config.model.dtype) + s.length * s.ring.bits // 8
        return float(vectors + protocol), 2 * len(STAGES) * at.config.federation.nodes

    def survivors_needed(self, at: Setting) -> str:
        """See `Trust.survivors_needed`."""
        return f"{self._least(at)} of {at.config.federation.holders}"


@functools.lru_cache(maxsize=16)
def _graph(
    holders: int, corrupt: float, tolerated: float, neighbours: int | None, threshold: int | None
) -> secure_sum.SafeGraph:
    if neighbours is None or threshold is None:
        return secure_sum.safe_graph(holders, corrupt, tolerated)
    graph = secure_sum.SafeGraph(neighbours, threshold)
    secure_sum.check_threshold(holders, graph, corrupt)
    return graph


def _vector(statistic: Statistic, multipliers: tuple[float, ...]) -> Vector:
    parts = statistic.parts
    return Vector.of([part.length for part in parts], [part.bound for part in parts], multipliers)


def _signs(at: Setting, step: int) -> bytes:
    """The key of the rotation: public, and apart from all data."""
    return derive(at.config.seed, "rotation", step)


def _values(vector: NDArray[Any], setup: MaskedSum, holder: int, task: StepTask) -> NDArray[np.int64]:
    """Return a holder's rounded sum with its share of the noise, int64 (D,)."""
    key = task.keys["holders"]
    values = setup.quantiser.encode(
        setup.vector.weighted(vector), task.keys["rotation"], derive(key, "dither", holder)
    )
    values += setup.shares.sample(derive(key, "noise share", holder), len(values))
    return values


def _check_size(setup: MaskedSum, total: NDArray[np.int64], count: int, survivors: int) -> None:
    """Refuse a sum longer than `count` clipped contributions, the rounding and the noise can make it."""
    root = math.sqrt(len(total))
    clipped = count * setup.vector.sensitivity * setup.quantiser.scale
    noise = setup.shares.norm_bound(len(total), survivors)
    limit = clipped * (1.0 + ROUNDING) + survivors * root + noise
    if (norm := float(np.linalg.norm(total.astype(np.float64)))) > limit:
        raise RunError(
            f"the secure sum has norm {norm:.6g} in ring units, above {limit:.6g}, which {count} clipped "
            "examples, the rounding and the noise give at most: a masked vector was changed, or not "
            "clipped."
        )


def _facts(setup: MaskedSum, survivors: int, damaged: list[tuple[int, int]]) -> dict[str, Public[Any]]:
    """Survivors, the standard deviation of the noise of the holders and of the server, and the (revealing,
    dealing) holders of damaged shares where there were any; none depends on data."""
    shares, scale = setup.shares, setup.quantiser.scale
    pairs = [list(pair) for pair in damaged]
    return {
        "survivors": Public(survivors),
        "noise_std_of_holders": Public(math.sqrt(shares.realised(survivors)) / scale),
        "noise_std_of_server": Public(math.sqrt(shares.missing(survivors)) / scale),
        **({"damaged_shares": Public(pairs)} if pairs else {}),
    }


def _no_sum(clip: ClipRule) -> ClippedSum:
    empty = torch.zeros(0, dtype=torch.float64)
    return ClippedSum(empty, 0, clip.sensitivity, empty, empty)
