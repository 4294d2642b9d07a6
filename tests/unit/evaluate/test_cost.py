"""What scoring costs beside sampling, at the size of Stable Diffusion 1.5, by shapes alone."""

import jax
import numpy as np

from benchmarks.count_flops import unet_flops
from ipadapter_jax.evaluate.clip_scorer import _REFERENCE_CONFIG, embed_captions, embed_images
from ipadapter_jax.models.clip import CLIP
from ipadapter_jax.models.unet_config import UNetConfig
from ipadapter_jax.runtime.flops import count_flops
from ipadapter_jax.runtime.mesh import local_mesh
from ipadapter_jax.weights.components import WHOLE_CLIP, abstract_params

STEPS, BRANCHES, IMAGES, CAPTIONS = 50, 2, 4, 5  # of COCO's captions; the paper's sampler


def example(*shape: int, dtype: type) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_scoring_is_a_small_part_of_the_work():
    """One image prompt: its image, its 4 images and 5 captions, against 4 runs of the sampler without the VAE."""
    clip, mesh = CLIP(_REFERENCE_CONFIG), local_mesh()
    params = abstract_params(WHOLE_CLIP, clip)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 427_616_513 - 1  # without the logit's scale

    def flops(function, rows: jax.ShapeDtypeStruct) -> float:
        program = jax.make_jaxpr(function, static_argnums=(0, 1))(clip, mesh, params, rows)
        return count_flops(program).total() / rows.shape[0]

    image = flops(embed_images, example(4 * mesh.size, 224, 224, 3, dtype=np.uint8))
    caption = flops(embed_captions, example(4 * mesh.size, 77, dtype=np.int32))
    assert 155e9 < image < 170e9  # twice the published 81 billion multiplications
    scoring = (1 + IMAGES) * image + CAPTIONS * caption
    sampling = IMAGES * STEPS * BRANCHES * unet_flops(UNetConfig(), 64, 64).total()
    assert scoring / sampling < 0.005  # 0.3 %; the aim was 5 %
