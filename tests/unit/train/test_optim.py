"""What the optimiser's helpers compile to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ipadapter_jax.train.config import Optim
from ipadapter_jax.train.optim import all_finite, learning_rate, make_optimizer, updates_done


def fused_operands(leaves: int) -> int:
    """Of all fused kernels of an update that happens only where all of it is finite."""

    def update(old: list, by: list) -> list:
        new = [x - y for x, y in zip(old, by, strict=True)]
        return [jnp.where(all_finite(new), x, y) for x, y in zip(new, old, strict=True)]

    tree = [jnp.ones(8 + i) for i in range(leaves)]
    text = jax.jit(update).lower(tree, tree).compile().as_text()
    return sum(len(found.split(", ")) for found in re.findall(r" fusion\(([^)]*)\)", text))


def test_an_update_compiles_in_proportion_to_its_leaves() -> None:
    """Fused into every leaf's update, the flags of all leaves make its square: minutes and 13 GB for a UNet's."""
    few, many = fused_operands(10), fused_operands(40)
    assert 10 <= few < 120 and many < 6 * few


@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_number_is_enough(bad: float | None, place: int) -> None:
    leaves = [np.ones(3, np.float32), np.float32(2), np.ones((2, 2), np.float16)]
    if bad is not None:
        leaves[place] = np.full_like(leaves[place], bad)
    assert bool(jax.jit(all_finite)(leaves)) == (bad is None)


def test_the_learning_rate_is_that_of_the_update() -> None:
    """Read from the optimizer's state, which a skipped step leaves as it is. Without decay Adam's first updates are as
    large as the rate."""
    optim = Optim(learning_rate=0.1, warmup_steps=3, weight_decay=0.0)
    optimizer = make_optimizer(optim, {"unet": True})
    params = {"unet": {"w": jnp.zeros(3)}}
    state = optimizer.init(params)
    for expected in (0.025, 0.05, 0.075, 0.1, 0.1):
        rate = learning_rate(optim)(updates_done(state))
        updates, new = optimizer.update({"unet": {"w": jnp.ones(3)}}, state, params)
        np.testing.assert_allclose(rate, expected, rtol=1e-6)
        np.testing.assert_allclose(updates["unet"]["w"], -expected, rtol=1e-5)
        assert int(updates_done(state)) + 1 == int(updates_done(new))
        state = new


def test_gradients_are_clipped_by_their_norm() -> None:
    """Adam does not see the scale of its first gradients; its moments do."""
    optimizer = make_optimizer(Optim(clip_norm=1.0), {"unet": True})
    params = {"unet": {"v": jnp.zeros(1), "w": jnp.zeros(1)}}
    for large, clipped in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        gradients = {"unet": {name: jnp.full(1, value) for name, value in zip("vw", large, strict=True)}}
        _, state = optimizer.update(gradients, optimizer.init(params), params)
        moments = optax.tree_utils.tree_get(state, "mu")["unet"]
        np.testing.assert_allclose([moments[name][0] for name in "vw"], np.multiply(clipped, 0.1), rtol=1e-6)
