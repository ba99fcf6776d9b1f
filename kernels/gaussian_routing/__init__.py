"""Routing of matrix capsules by mixtures of Gaussians: EM (Hinton et al. 2018) and variational Bayes (Ribeiro 2020)."""

from . import reference
from .couplings import em_couplings, vb_couplings
from .ops import em_routing, vb_routing

__all__ = ["em_couplings", "em_routing", "reference", "vb_couplings", "vb_routing"]
