"""Routing of matrix capsules by mixtures of Gaussians: EM (Hinton et al. 2018) and variational Bayes (Ribeiro 2020)."""

from . import reference
from .ops import em_routing, vb_routing

__all__ = ["em_routing", "reference", "vb_routing"]
