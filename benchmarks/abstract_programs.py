"""The training step and the sampler, traced with shapes instead of arrays: programs of the real size without memory."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ipadapter_jax.diffusion.sampler_table import init_state
from ipadapter_jax.diffusion.samplers import sample_table
from ipadapter_jax.diffusion.schedule import NoiseSchedule
from ipadapter_jax.models.clip import CLIPText, CLIPVision
from ipadapter_jax.models.families import SD1
from ipadapter_jax.models.image_proj_config import ImageProjConfig
from ipadapter_jax.models.image_projections import example_features, image_projection
from ipadapter_jax.models.ip_adapter import IPAdapter
from ipadapter_jax.models.text_encoders import TextEncoders
from ipadapter_jax.models.unet import UNet
from ipadapter_jax.models.unet_config import cross_attention_layers
from ipadapter_jax.models.vae import VAE
from ipadapter_jax.ops import attention_kernels
from ipadapter_jax.ops.attention import KeyValue
from ipadapter_jax.pipelines import programs
from ipadapter_jax.pipelines.conditioning import Conditioning, Guidance, ImageBranch
from ipadapter_jax.pipelines.denoise import STATE, Steps
from ipadapter_jax.pipelines.denoiser import Denoiser
from ipadapter_jax.runtime import random_keys
from ipadapter_jax.runtime.mesh import batch_sharding, replicated
from ipadapter_jax.testing.random_weights import SCHEDULER
from ipadapter_jax.testing.sizes import FULL, ModelConfigs
from ipadapter_jax.train.batches import FrozenModels, batch_of
from ipadapter_jax.train.config import Data, Model, Optim, Train
from ipadapter_jax.train.networks import Networks
from ipadapter_jax.train.optim import make_optimizer, partition, trainable_mask
from ipadapter_jax.train.sharding import frozen_sharding
from ipadapter_jax.train.state import init_train_state, state_shardings
from ipadapter_jax.train.step import make_step
from ipadapter_jax.weights.components import IMAGE_ENCODER, TEXT_ENCODER, UNET, VAE_COMPONENT, abstract_params

TEXT_TOKENS, IMAGE_TOKENS = 77, 4


@contextlib.contextmanager
def as_on(platform: str) -> Iterator[None]:
    """Programs are traced as on a "gpu" or "tpu" of today, with its attention kernels, whatever this machine has."""
    fakes = [
        (jax, "default_backend", lambda: platform),
        (attention_kernels, "cudnn_runs", lambda depth, dtype: depth % 8 == 0 and depth <= 256),
        # JAX asks the device in the middle of tracing.
        (fused_attention_stablehlo, "check_cudnn_version", lambda: 91100),
        (fused_attention_stablehlo, "check_compute_capability", lambda capability: True),
        (fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False),
    ]
    with contextlib.ExitStack() as stack:
        for fake in fakes:
            stack.enter_context(mock.patch.object(*fake))
        stack.callback(jax.clear_caches)
        jax.clear_caches()  # what was traced before is another platform's
        yield


class Sampler(NamedTuple):
    """`programs.denoise` and its arguments."""

    arguments: tuple[Any, ...]

    def trace(self):
        return programs.denoise.jitted.trace(*self.arguments)


def abstract_sampler(
    mesh: Mesh,
    *,
    batch: int = 1,
    steps: int = 50,
    sizes: ModelConfigs = FULL,
    latent: int = 64,
    dtype: Any = "bfloat16",
) -> Sampler:
    """DDIM with guidance and one base adapter, on a mesh of the one axis "data"."""
    compute = jnp.dtype(dtype)
    unet, rows = UNet(sizes.unet, compute), NamedSharding(mesh, P("data"))

    def given(shape, dtype, sharding=None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or replicated(mesh))

    def like(tree):
        return jax.tree.map(lambda x: given(np.shape(x), np.asarray(x).dtype), tree)

    run = sample_table("ddim", NoiseSchedule.from_json(SCHEDULER), steps, 0.0, 1.0)
    state = jax.eval_shape(init_state, given((batch, latent, latent, 4), jnp.float32))
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), STATE)
    state = jax.tree.map(lambda x, sharding: given(x.shape, x.dtype, sharding), state, shardings)
    layers = cross_attention_layers(sizes.unet)
    text, image = (
        [KeyValue(*(given((1, 2, tokens, layer.width), compute) for _ in "kv")) for layer in layers]
        for tokens in (TEXT_TOKENS, IMAGE_TOKENS)
    )
    branch = ImageBranch(
        kv=image,
        weight=given((steps, 2, len(layers)), jnp.float32),
        mask=[given(((-(-latent // 2**layer.level)) ** 2,), jnp.float32) for layer in layers],
    )
    conditioning = Conditioning(
        prompt_of_sample=given((batch,), jnp.int32, rows),
        text_kv=text,
        image_branches=[branch],
        guidance=Guidance(scale=given((), jnp.float32), rescale=given((), jnp.float32)),
    )
    params = jax.tree.map(lambda leaf: given(leaf.shape, compute), abstract_params(UNET, unet))
    return Sampler((Denoiser(unet), mesh, {"unet": params}, state, Steps(like(run.steps), None), conditioning))


class Step(NamedTuple):
    """A training step and its arguments."""

    make: Callable[[Mesh], Callable]
    mesh: Mesh
    arguments: tuple[Any, Any, Any]  # state, frozen, batch
    config: Train

    def trace(self):
        return jax.jit(self.make(self.mesh), donate_argnums=0).trace(*self.arguments)


def abstract_step(
    mesh: Mesh,
    *,
    batch: int,
    sizes: ModelConfigs = FULL,
    latent: int = 64,
    dtype: Any = "bfloat16",
    remat=False,
    live=False,
    accumulate=1,
) -> Step:
    """The base adapter on networks of the given sizes; `latent` is the side of the latents. Precomputed latents and
    features unless `live`."""
    compute = jnp.dtype(dtype)
    unet, vae = UNet(sizes.unet, compute, remat=remat), VAE(sizes.vae, compute)
    text, vision = CLIPText(sizes.text_encoder, compute), CLIPVision(sizes.image_encoder, compute)
    projection = ImageProjConfig("base", sizes.image_encoder.projection_dim, sizes.unet.cross_attention_dim, 4)
    networks: Any = Networks(
        unet=unet,
        vae=vae,
        text_encoders=TextEncoders.of(SD1, {"text_encoder": text}),
        schedule=NoiseSchedule.from_json(SCHEDULER),
        latent_shape=(latent, latent, 4),
        image_encoder=vision,
        projection=image_projection(projection, compute),
        adapter=IPAdapter(tuple(site.width for site in cross_attention_layers(sizes.unet)), compute),
    )
    parts = {
        "unet": (UNET, unet),
        "vae": (VAE_COMPONENT, vae),
        "text_encoder": (TEXT_ENCODER, text),
        "image_encoder": (IMAGE_ENCODER, vision),
    }

    def given(shape, dtype, sharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    frozen = {name: abstract_params(*part) for name, part in parts.items() if live or name != "image_encoder"}
    frozen = jax.tree.map(lambda leaf: given(leaf.shape, compute, frozen_sharding(mesh, leaf)), frozen)
    models = FrozenModels(given((77,), jnp.int32, replicated(mesh)), frozen)
    tokens = jnp.zeros((1, 4, sizes.unet.cross_attention_dim))
    trainable = {
        "image_proj": jax.eval_shape(networks.projection.init, random_keys.key(0), example_features(projection)),
        "ip_adapter": jax.eval_shape(networks.adapter.init, random_keys.key(0), tokens),
    }
    model = Model(dtype=dtype, remat="always" if remat else "never")
    config = Train(model=model, data=Data(batch_size=batch), optim=Optim(accumulate=accumulate))
    mask = trainable_mask(config.model)
    optimizer = make_optimizer(config.optim, mask)
    trainable = partition(frozen | {part: tree["params"] for part, tree in trainable.items()}, mask)
    state = jax.eval_shape(functools.partial(init_train_state, optimizer=optimizer, dtype=dtype, ema=False), trainable)
    state = jax.tree.map(lambda x, sharding: given(x.shape, x.dtype, sharding), state, state_shardings(mesh, state))
    rows = functools.partial(given, sharding=batch_sharding(mesh))
    images = {
        "pixels": rows((batch, 8 * latent, 8 * latent, 3), jnp.uint8),
        "clip_pixels": rows((batch, sizes.image_encoder.image_size, sizes.image_encoder.image_size, 3), jnp.uint8),
    }
    cached = {
        "mean": rows((batch, latent, latent, 4), compute),
        "logvar": rows((batch, latent, latent, 4), compute),
        "features": rows((batch, sizes.image_encoder.projection_dim), compute),
    }
    given_batch = batch_of((images if live else cached) | {"input_ids": rows((batch, 77), jnp.int32)})
    make = functools.partial(make_step, networks, optimizer, config)
    return Step(make, mesh, (state, models, given_batch), config)
