"""A training step with shapes for arguments: the real size at no cost."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from make_random_weights import FULL, SCHEDULER

from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.models.adapter import IPAdapter
from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.projections import ImageProjConfig, example_features, image_projection
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import cross_attention_sites
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.train.config import Data, Model, Optim, Train
from ipadapter_jax.train.networks import Networks
from ipadapter_jax.train.optim import make_optimizer, trainable, view
from ipadapter_jax.train.sharding import by_row, of_frozen, replicated
from ipadapter_jax.train.state import initial_state, state_shardings
from ipadapter_jax.train.step import make_step
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT, template_of


class Step(NamedTuple):
    make: Callable[[Mesh], Callable]
    mesh: Mesh
    arguments: tuple[Any, Any, Any]  # state, frozen, batch
    config: Train

    def trace(self):
        return jax.jit(self.make(self.mesh), donate_argnums=0).trace(*self.arguments)


def abstract_step(
    mesh: Mesh, *, batch: int, sizes=FULL, latent=64, dtype="bfloat16", remat=False, live=False, accumulate=1
) -> Step:
    """The base adapter on networks of the given sizes; `latent` is the side of the latents. Precomputed latents and
    features unless `live`."""
    compute = jnp.dtype(dtype)
    unet, vae = UNet(sizes[0], compute, remat=remat), VAE(sizes[1], compute)
    text, vision = CLIPText(sizes[2], compute), CLIPVision(sizes[3], compute)
    projection = ImageProjConfig("base", sizes[3].projection_dim, sizes[0].cross_attention_dim, 4)
    networks = Networks(
        unet=unet,
        vae=vae,
        text_encoder=text,
        schedule=NoiseSchedule.from_json(SCHEDULER),
        latent_shape=(latent, latent, 4),
        image_encoder=vision,
        projection=image_projection(projection, compute),
        adapter=IPAdapter(tuple(site.width for site in cross_attention_sites(sizes[0])), compute),
    )
    parts = {
        "unet": (UNET, unet),
        "vae": (VAE_COMPONENT, vae),
        "text_encoder": (TEXT_ENCODER, text),
        "image_encoder": (IMAGE_ENCODER, vision),
    }

    def given(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    frozen = {name: template_of(*part) for name, part in parts.items() if live or name != "image_encoder"}
    frozen = jax.tree.map(lambda leaf: given(leaf.shape, compute, of_frozen(mesh, leaf)), frozen)
    frozen["empty_ids"] = given((77,), jnp.int32, replicated(mesh))
    tokens = jnp.zeros((1, 4, sizes[0].cross_attention_dim))
    learnt = {
        "image_proj": jax.eval_shape(networks.projection.init, jax.random.key(0), example_features(projection)),
        "ip_adapter": jax.eval_shape(networks.adapter.init, jax.random.key(0), tokens),
    }
    config = Train(
        model=Model(dtype=dtype, remat=remat), data=Data(batch_size=batch), optim=Optim(accumulate=accumulate)
    )
    mask = trainable(config.model)
    optimizer = make_optimizer(config.optim, mask)
    learnt = view(frozen | {part: tree["params"] for part, tree in learnt.items()}, mask)
    state = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer, config=config), learnt)
    state = jax.tree.map(lambda x, sharding: given(x.shape, x.dtype, sharding), state, state_shardings(mesh, state))
    rows = functools.partial(given, sharding=by_row(mesh))
    pictures = {
        "pixels": rows((batch, 8 * latent, 8 * latent, 3), jnp.uint8),
        "clip_pixels": rows((batch, sizes[3].image_size, sizes[3].image_size, 3), jnp.uint8),
    }
    cached = {
        "mean": rows((batch, latent, latent, 4), compute),
        "logvar": rows((batch, latent, latent, 4), compute),
        "features": rows((batch, sizes[3].projection_dim), compute),
    }
    given_batch = (pictures if live else cached) | {"input_ids": rows((batch, 77), jnp.int32)}
    make = functools.partial(make_step, networks, optimizer, config)
    return Step(make, mesh, (state, frozen, given_batch), config)
