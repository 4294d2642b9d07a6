"""The forms of a convolution agree; which one runs depends on its shape."""

import functools

import jax
import numpy as np
import pytest

from ipadapter_jax.ops.convolution import convolve

NUMBERS = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 5, 7), 3), ((1, 30, 31), 3), ((2, 5, 7), 1), ((2, 5, 7), 2), ((1, 8, 8), 5)], ids=str
)
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_xla_with_its_gradients(shape, size, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*shape, 6)).astype(np.float32)
    kernel = rng.standard_normal((size, size, 6, 4)).astype(np.float32)
    for padding in ([(size // 2, size // 2)] * 2, [(0, 1), (0, 1)], "VALID"):
        options = {"window_strides": (stride, stride), "padding": padding, "dimension_numbers": NUMBERS}
        expected, expected_gradient = jax.vjp(functools.partial(jax.lax.conv_general_dilated, **options), x, kernel)
        found, gradient = jax.vjp(functools.partial(convolve, **options), x, kernel)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        by_output = rng.standard_normal(expected.shape).astype(np.float32)
        for one, other in zip(gradient(by_output), expected_gradient(by_output), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5 * abs(other).max())


def operations(positions: int, channels: int, dtype=np.float32) -> str:
    x = jax.ShapeDtypeStruct((1, positions, 1, channels), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), dtype)
    options = {"window_strides": (1, 1), "padding": [(1, 1), (1, 1)], "dimension_numbers": NUMBERS}
    return str(jax.make_jaxpr(functools.partial(convolve, **options))(x, kernel))


def test_small_convolutions_are_products():
    assert "dot_general" in operations(512, 2) and "conv_general_dilated" not in operations(512, 2)
    assert "conv_general_dilated" in operations(513, 2)


def test_wide_convolutions_are_sixteen_products():
    assert operations(513, 256).count("dot_general") == 16
    assert "conv_general_dilated" in operations(513, 255)
    assert "conv_general_dilated" in operations(513, 256, jax.numpy.bfloat16)  # differences would cost its digits
