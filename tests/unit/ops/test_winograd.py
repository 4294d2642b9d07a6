"""Convolutions by tiles are convolutions, in bands of any size and at sizes that no tile divides."""

import functools

import jax
import numpy as np
import pytest

from ipadapter_jax.ops.cpu import winograd


@pytest.mark.parametrize("shape", [(2, 6, 8), (1, 5, 7), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("band", [1, 40, 1000])
def test_equals_xla_with_its_gradients(shape, band, monkeypatch):
    monkeypatch.setattr(winograd, "_BAND", band)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*shape, 6)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 6, 4)).astype(np.float32)
    plain = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=[(1, 1)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    expected, expected_gradient = jax.vjp(plain, x, kernel)
    found, gradient = jax.vjp(winograd.winograd, x, kernel)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    by_output = rng.standard_normal(expected.shape).astype(np.float32)
    for one, other in zip(gradient(by_output), expected_gradient(by_output), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * abs(other).max())


def test_is_as_exact_as_float32_allows():
    """Root mean square against float64, of outputs with a standard deviation of 1: XLA's convolution has 4e-7."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 24, 24, 64)), rng.standard_normal((3, 3, 64, 64)) / 24
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + 24, j : j + 24] @ kernel[i, j] for i in range(3) for j in range(3))
    found = winograd.winograd(x.astype(np.float32), kernel.astype(np.float32))
    assert np.sqrt(np.mean((found - expected) ** 2)) < 8e-7
