"""What a network predicts, in every parameterization and in both spaces of noisy samples."""

import numpy as np
import pytest

from ipadapter_jax.diffusion.parameterization import (
    PREDICTION_TYPES,
    NoiseLevel,
    add_noise,
    to_epsilon,
    to_x0,
    training_target,
)

X0, EPSILON = np.float64(0.7), np.float64(-1.3)
LEVELS = [NoiseLevel.variance_preserving(0.3), NoiseLevel.variance_exploding(2.5)]


def prediction(prediction_type: str, level: NoiseLevel) -> float:
    """What a perfect network gives: it sees the noisy sample with weights whose squares sum to 1."""
    return training_target(prediction_type, level.alpha / level.norm, level.sigma / level.norm, X0, EPSILON)


@pytest.mark.parametrize("level", LEVELS)
def test_the_network_sees_a_sample_of_unit_variance(level):
    assert level.alpha**2 + level.sigma**2 == pytest.approx(level.norm**2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_recovers_the_same_sample_and_noise(prediction_type, level):
    x, output = add_noise(level.alpha, level.sigma, X0, EPSILON), prediction(prediction_type, level)
    for found, expected in ((to_x0, X0), (to_epsilon, EPSILON)):
        of_x, of_output = found(prediction_type, level)
        assert of_x * x + of_output * output == pytest.approx(expected)


def test_the_target_of_a_network_is_what_it_predicts():
    alpha, sigma, *_ = NoiseLevel.variance_preserving(0.3)
    assert training_target("epsilon", alpha, sigma, X0, EPSILON) == EPSILON
    assert training_target("sample", alpha, sigma, X0, EPSILON) == X0
    assert training_target("v_prediction", alpha, sigma, X0, EPSILON) == alpha * EPSILON - sigma * X0


def test_where_no_signal_is_left_only_epsilon_does_not_give_the_clean_sample():
    nothing = NoiseLevel.variance_preserving(0.0)
    assert not np.isfinite(to_x0("epsilon", nothing)).any()
    assert np.isfinite([*to_x0("v_prediction", nothing), *to_x0("sample", nothing)]).all()
