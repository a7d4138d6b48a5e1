"""Clipped gradient sums at nearly the price of ordinary training: one forward and one backward pass.

engine      one call from start to end
level       which tensors carry examples
mode        watching the forward pass, without touching the model
tape        what a call records
linear, conv, conv_rule, norm, embedding, attention, recurrent
            per-example norms and weighted sums, layer kind by layer kind
repeat      operations without a rule
geometry, gather, conv_layout
            where a kernel meets its input; gradients as products with gathered patches; how gradients lie
standardise weight-standardised kernels in closed form
joint       weights used more than once, or computed from parameters
graphs      what a call launches, recorded and replayed
choose      which way is cheapest, under a byte guard
"""

from typing import TYPE_CHECKING, Any

from fedsim.grads.bookkeeping.options import Options

if TYPE_CHECKING:
    from fedsim.grads.bookkeeping.engine import clipped_sum

__all__ = ["Options", "clipped_sum"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: a dry run computes no gradient."""
    if name == "clipped_sum":
        from fedsim.grads.bookkeeping.engine import clipped_sum

        return clipped_sum
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
