"""The count of a program's work against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ipadapter_jax.runtime.flops import count_flops, count_recomputed_flops

X, W = jnp.ones((2, 3)), jnp.ones((3, 3))
PRODUCT = 2 * (2 * 3 * 3)


def count(function, *args) -> dict[str, int]:
    return dict(count_flops(jax.make_jaxpr(function)(*args)))


def test_a_loop_counts_as_often_as_it_runs():
    @jax.jit
    def program(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.dot)(x, W), None), x, length=7)[0]

    assert count(program, X) == {"matmul": 7 * PRODUCT}


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="scan"):
        count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ W, x), X)
    assert count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x @ W), X) == {"matmul": PRODUCT}


def test_branches_count_as_the_dearest():
    assert count(lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ W @ W, lambda x: x @ W, x), X) == {
        "matmul": 2 * PRODUCT
    }


def test_every_device_counts():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.shard_map(lambda x: x @ W, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert count(spread, X) == {"matmul": PRODUCT}


def test_products_that_no_result_needs_are_not_counted():
    """Gradients of frozen weights, in a program inside a program too."""

    @jax.jit
    def gradients(x, w):
        return jax.grad(lambda x, w: jnp.sin(x @ w).sum(), argnums=(0, 1))(x, w)

    assert count(gradients, X, W) == {"matmul": 3 * PRODUCT}  # the product, and the gradients of both its sides
    assert count(lambda x, w: gradients(x, w)[0], X, W) == {"matmul": 2 * PRODUCT}


def test_convolutions_and_their_gradients():
    """6x6 pixels of 5 channels to 3x3 of 7 by a 3x3 kernel. Each gradient multiplies as often, when the zeros that a
    transpose puts between its inputs are left out."""
    image, kernel = jnp.ones((1, 6, 6, 5)), jnp.ones((3, 3, 5, 7))

    def conv(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    once = 2 * 3 * 3 * 3 * 3 * 5 * 7
    assert count(conv, image, kernel) == {"conv": once}
    assert count(lambda y: jax.vjp(lambda k: conv(image, k), kernel)[1](y)[0], jnp.ones((1, 3, 3, 7))) == {"conv": once}
    assert count(lambda y: jax.vjp(lambda x: conv(x, kernel), image)[1](y)[0], jnp.ones((1, 3, 3, 7))) == {"conv": once}


@pytest.mark.parametrize("loop", [False, True])
def test_recomputation_is_counted_apart(loop):
    """Two products in the block: sin needs the first one's result again, nothing needs the second's."""

    def block(x, w):
        return jnp.sin(x @ w) @ w

    def loss(x, w, again):
        inside = jax.checkpoint(block) if again else block
        y = jax.lax.map(lambda row: inside(row[None], w)[0], x) if loop else inside(x, w)
        return (y**2).sum()

    plain, again = (jax.make_jaxpr(jax.grad(lambda x, a=a: loss(x, W, a)))(X) for a in (False, True))
    assert count_flops(plain) == count_flops(again) == {"matmul": 4 * PRODUCT}
    assert count_recomputed_flops(plain) == {}
    assert count_recomputed_flops(again) == {"matmul": PRODUCT}
