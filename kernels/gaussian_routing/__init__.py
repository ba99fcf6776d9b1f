"""Routing of matrix capsules by mixtures of Gaussians: EM (Hinton et al. 2018) and variational Bayes (Ribeiro 2020)."""

from . import by_moments, ops, reference

__all__ = ["by_moments", "ops", "reference"]
