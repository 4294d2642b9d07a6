"""An image that is doubled and convolved, in one go, is the image doubled and then convolved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipadapter_jax.models.layers import Upsample
from ipadapter_jax.ops import upsample_conv
from ipadapter_jax.ops.upsample_conv import convolve_doubled, convolve_upsampled, upsample_nearest
from ipadapter_jax.runtime.flops import count_flops

OPTIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def in_two_steps(x, kernel):
    doubled = upsample_nearest(x, 2 * x.shape[1], 2 * x.shape[2])
    return jax.lax.conv_general_dilated(doubled, kernel, (1, 1), ((1, 1), (1, 1)), **OPTIONS)


def test_nearest_neighbours_of_any_size():
    found = upsample_nearest(np.arange(6.0).reshape(1, 2, 3, 1), 3, 6)
    np.testing.assert_array_equal(found[0, ..., 0], np.repeat([[0, 1, 2], [0, 1, 2], [3, 4, 5]], 2, axis=1))


@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 1, 3, 2), (1, 24, 30, 5)], ids=str)
def test_equals_the_two_steps_with_its_gradients(shape):
    x, kernel = drawn(*shape), drawn(3, 3, shape[-1], 4)
    expected, expected_gradient = jax.vjp(in_two_steps, x, kernel)
    found, gradient = jax.vjp(functools.partial(convolve_doubled, **OPTIONS), x, kernel)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    by_output = drawn(*expected.shape)
    for one, other in zip(gradient(by_output), expected_gradient(by_output), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * abs(other).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_little_more(dtype):
    """The kernel's sums are rounded, too: measured 1.40 and 1.42 times the error of the two steps, which rounds the
    result alone, in the root mean square."""
    x, kernel = drawn(2, 16, 16, 64), drawn(3, 3, 64, 64)
    half = [jnp.asarray(array, dtype) for array in (x, kernel)]
    exact = in_two_steps(*(array.astype(jnp.float32) for array in half))

    def error(found):
        assert found.dtype == jnp.dtype(dtype)
        return float(jnp.sqrt(jnp.mean((found.astype(jnp.float32) - exact) ** 2)))

    assert error(convolve_doubled(*half, **OPTIONS)) < 1.5 * error(in_two_steps(*half))


@pytest.mark.parametrize("size", [(24, 8), (23, 7)], ids=str)
@pytest.mark.parametrize("fewest", [1, 1000])
def test_the_layer_meets_any_size(size, fewest, monkeypatch):
    monkeypatch.setattr(upsample_conv, "_FEWEST_POSITIONS", fewest)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    layer, x = Upsample(8, jnp.float32), drawn(1, 12, 4, 8)
    params = layer.init(jax.random.key(0), x, *size)
    kernel, bias = params["params"]["conv"]["kernel"], params["params"]["conv"]["bias"]
    expected = jax.lax.conv_general_dilated(upsample_nearest(x, *size), kernel, (1, 1), ((1, 1), (1, 1)), **OPTIONS)
    np.testing.assert_allclose(layer.apply(params, x, *size), expected + bias, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "rows", "share"), [("gpu", 32, 4 / 9 * (33 / 32) ** 2), ("gpu", 31, 1), ("cpu", 32, 1)]
)
def test_four_products_in_place_of_nine_where_positions_are_many(platform, rows, share, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)

    def work(run):
        return count_flops(jax.make_jaxpr(run)(drawn(1, rows, 32, 8), drawn(3, 3, 8, 8))).total()

    def ours(x, kernel):
        return convolve_upsampled(2 * x.shape[1], 64, x, kernel, **OPTIONS)

    assert work(ours) / work(in_two_steps) == pytest.approx(share)
