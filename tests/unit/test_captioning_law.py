"""The law of private captioning: its levels differ in noise alone, and its table says what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import captioning_law
from benchmarks.captioning_law import CASES, EPSILON, NONE, SCENES, Case


def test_levels_of_noise_differ_in_noise_alone(tmp_path: Path) -> None:
    """All clip: a level that does not would have what clipping costs pass for a cost of noise."""
    held = {}
    for share in captioning_law.SHARES:
        config = captioning_law.private(Case(share, SCENES, 0), tmp_path)
        held[share] = config.defining()
        privacy = held[share].pop("privacy")
        assert config.strategy.name == "central"
        assert privacy.pop("clip_norm") == 1.0
        multiplier, target = privacy.pop("noise_multiplier"), privacy.pop("target_epsilon")
        held[share]["privacy"] = privacy
        if share == 1.0:
            assert (multiplier, target) == (None, EPSILON)
            whole = captioning_law.check(config)["noise_multiplier"]
        else:
            assert target is None
            held[share]["multiplier"] = multiplier
    for share in (NONE, *captioning_law.SHARES[1:-1]):
        assert held[share].pop("multiplier") == pytest.approx(share * whole)
        assert held[share] == held[1.0]


def test_no_two_runs_share_a_folder() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.share for case in CASES if case.scenes < SCENES} == {1.0}
