"""The UNet where no peer has the same: what a backward pass keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.weights.components import UNET, abstract_params

SMALL = UNetConfig(
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=8,
    norm_num_groups=8,
)


def test_remat_changes_what_is_kept_and_nothing_else():
    """The same parameters; the output and the gradients of weights and image prompt up to the rounding of float32, as
    the compiler sums in another order."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape, np.float32)

    latents, text, image = random(2, 8, 8, 4), random(2, 5, 8), random(2, 3, 8)
    plain, remat = UNet(SMALL), UNet(SMALL, remat=True)
    template = abstract_params(UNET, plain)
    assert jax.tree.structure(abstract_params(UNET, remat)) == jax.tree.structure(template)
    params = jax.tree.map(lambda leaf: random(*leaf.shape) / max(1, leaf.size // leaf.shape[-1]) ** 0.5, template)

    def loss(module, params, image):
        apply = functools.partial(module.apply, {"params": params})
        text_kv, image_kv = (apply(x, method=UNet.text_kv) for x in (text, image))
        output = apply(latents, jnp.array([3, 700]), text_kv, [image_kv], [[1.0] * len(text_kv)])
        return (output**2).mean(), output

    results = []
    for module in (plain, remat):
        traced = jax.jit(jax.grad(functools.partial(loss, module), argnums=(0, 1), has_aux=True)).trace(params, image)
        assert ("rematted_computation" in traced.lower().as_text(debug_info=True)) is module.remat
        quickly = {"xla_backend_optimization_level": 0}  # half the time to compile
        results.append(traced.lower().compile(quickly)(params, image))
    for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1e-3, np.abs(expected).max()))
