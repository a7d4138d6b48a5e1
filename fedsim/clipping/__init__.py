"""Clip rules: how much of each contribution enters a sum, and what one can change, one rule a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsim.clipping.base import ClipRule
from fedsim.registry import Registry

if TYPE_CHECKING:
    from fedsim.config import PrivacyConfig

__all__ = ["CLIPPING", "ClipRule", "clip_rule"]

CLIPPING: Registry[ClipRule] = Registry("privacy.clipping", "fedsim.clipping", ClipRule, given=("clip_norm",))


def clip_rule(privacy: PrivacyConfig) -> ClipRule:
    """Return the rule that `privacy.clipping` chooses, with the bound `privacy.clip_norm`.

    Raises:
        InputError: no such rule, an option it does not read, or what is named makes none.
    """
    return CLIPPING.make(privacy.clipping, clip_norm=privacy.clip_norm)
