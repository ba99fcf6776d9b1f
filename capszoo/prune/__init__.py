"""Rank the parts of a capsule network and remove the least ones physically: a smaller network comes out.

Parts:
* conv1: filters of the first convolution, with their slices of the primary capsules' filters.
* types: primary capsule types, with their filters, their vote matrices and their share of the routing. This is what
  shrinks the large convolution of the primary capsules.
* capsules: single primary capsules, a type at a position. Their share of the routing goes, and with a vote matrix per
  capsule the matrix too. A type without capsules left goes as a whole.
* decoder: units of the two hidden layers of the reconstruction decoder, with their connections.

Removing a part changes nothing but that its values are zero: the smaller network computes what the given one computes
with the activations of the removed parts held at zero. A capsule of zeros votes zero for each class, which adds nothing
to the weighted sums of the routing.

Papers:
* Taylor score: `Pruning Convolutional Neural Networks for Resource Efficient Inference` -
  https://arxiv.org/abs/1611.06440, `Importance Estimation for Neural Network Pruning` -
  https://arxiv.org/abs/1906.10771
* Look-ahead score: `Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning` -
  https://arxiv.org/abs/2002.04809
* Single capsules: `PrunedCaps` - https://arxiv.org/abs/2512.06003; filters: `FastCaps` -
  https://arxiv.org/abs/2509.03103
"""

from .costs import Cost, cost
from .parts import PARTS, SCORES, count_parts, target_counts
from .pruning import PruneReport, prune
from .ranking import scores

__all__ = ["PARTS", "SCORES", "Cost", "PruneReport", "cost", "count_parts", "prune", "scores", "target_counts"]
