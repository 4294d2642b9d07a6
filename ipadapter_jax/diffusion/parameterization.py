"""The three quantities that a network may predict, and how the clean sample and the noise follow from each.

A noisy sample is x = alpha x0 + sigma epsilon. By a schedule's `prediction_type` the network gives epsilon ("epsilon"),
x0 ("sample") or v = alpha epsilon - sigma x0 ("v_prediction", arXiv 2202.00512, appendix D).
"""

from typing import NamedTuple

import numpy as np
from jax import Array

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseLevel(NamedTuple):
    """The weights of x0 and epsilon in a noisy sample. The network is given x / norm, in which the squares of both
    weights sum to 1."""

    alpha: float
    sigma: float
    norm: float = 1.0

    @classmethod
    def variance_preserving(cls, alpha_cumprod: float) -> "NoiseLevel":
        """x = sqrt(a) x0 + sqrt(1 - a) epsilon: DDPM's, in which networks are trained."""
        return cls(np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod))

    @classmethod
    def variance_exploding(cls, sigma: float) -> "NoiseLevel":
        """x = x0 + sigma epsilon."""
        return cls(1.0, sigma, np.sqrt(sigma**2 + 1))


class Combination(NamedTuple):
    """A quantity as a weighted sum: x times the sample and output times what the network gives."""

    x: float
    output: float


def to_x0(prediction_type: str, level: NoiseLevel) -> Combination:
    """The clean sample. Its weights are infinite for "epsilon" where no signal is left."""
    alpha, sigma, norm = level
    if prediction_type == "sample":
        return Combination(0.0, 1.0)
    if prediction_type == "v_prediction":
        return Combination(alpha / norm**2, -sigma / norm)
    with np.errstate(divide="ignore"):
        return Combination(1 / alpha, -sigma / alpha)


def to_epsilon(prediction_type: str, level: NoiseLevel) -> Combination:
    """The noise."""
    alpha, sigma, norm = level
    if prediction_type == "sample":
        return Combination(1 / sigma, -alpha / sigma)
    if prediction_type == "v_prediction":
        return Combination(sigma / norm**2, alpha / norm)
    return Combination(0.0, 1.0)


def add_noise(alpha: Array | float, sigma: Array | float, x0: Array, epsilon: Array) -> Array:
    """The noisy sample x."""
    return alpha * x0 + sigma * epsilon


def training_target(
    prediction_type: str, alpha: Array | float, sigma: Array | float, x0: Array, epsilon: Array
) -> Array:
    """What a network should give for the noisy sample; `alpha` and `sigma` are variance-preserving."""
    if prediction_type == "v_prediction":
        return alpha * epsilon - sigma * x0
    return x0 if prediction_type == "sample" else epsilon
