"""The named methods, and forms of them, on the small configuration."""

from __future__ import annotations

from fedsim import loading, presets
from fedsim.config import CONFIG_DIR, Config
from fedsim.method import Method
from tests.conftest import small

# Holder updates under other trust models and noise, and moments, are in the product (combinations.py).
HEADS = ("dp_ls", "dp_newton", "dp_fc")
ALL = [n for n in presets.names(CONFIG_DIR) if not n.startswith("dp_fedavg_") and n not in HEADS]
PRIVATE = [name for name in ALL if Method.of(loading.load(f"smoke/{name}")).private]

# Forms of a method that its options make another mechanism: they must satisfy the same.
FORMS = {
    "local_dpsgd, local steps": "strategy.options={local_steps: 3, local_learning_rate: 0.5}",
    "dp_fedavg, adaptive": "query.options={target_quantile: 0.5, count_noise: 2}",
    "shares_dpsgd, top up": "strategy.options={on_shortfall: top_up}",
}


def of(name: str, *overrides: str) -> Config:
    """Return the small configuration under a method, or under a form of one."""
    method, form = name.split(",")[0], [FORMS[name]] if name in FORMS else []
    noise = [] if method in PRIVATE else ["privacy.noise_multiplier=null", "privacy.clip_norm=1.0"]
    return small(f"preset={method}", *form, *noise, *overrides)
