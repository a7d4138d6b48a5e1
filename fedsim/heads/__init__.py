"""Private heads on fixed features: what is summed, how much one example can change it, and what follows.

Mehta et al. 2023 (arXiv 2211.13403) train the last layer of a network from a few noisy sums over the
examples: second moments of the features (least squares, DP-LS), Hessians (DP-Newton), or second moments once
and then gradients (DP-FC). Here is the mathematics, without a run around it:

* `parts`: the named sums of a release, their bounds and shares of the budget
* `rows`, `packing`, `products`: bounded features, symmetric matrices as vectors, their sums in blocks
* `moments`, `logistic`, `newton`, `feature_covariance`, `gradient`: the sums
* `linear`: weights of rows and flat parameters of the layer
* `spectrum`, `solve`: what a server makes of noisy sums; post-processing, which costs no privacy
* `closed_form`: the accounting of the papers, to set beside an exact one

All bounds are for adding or removing one example.
"""
