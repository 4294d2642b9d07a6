"""One training step: the paper's loss (arXiv 2308.06721, equation 6) and an update of the trainable parameters.

All random draws are made here. Those of a sample depend on (seed, step, index in the global batch) alone: a step gives
the same loss on any number of devices and processes, and a resumed run needs to know only its step."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from ipadapter_jax.diffusion.parameterization import add_noise, training_target
from ipadapter_jax.images.preprocess import CLIP_TABLE
from ipadapter_jax.models.vae import Posterior
from ipadapter_jax.ops.batch_sharding import batch_sharded
from ipadapter_jax.runtime.mesh import batch_sharding, replicated
from ipadapter_jax.runtime.random_keys import key
from ipadapter_jax.runtime.trees import Params
from ipadapter_jax.train.batches import EncodedBatch, FrozenModels, TrainBatch
from ipadapter_jax.train.config import Train
from ipadapter_jax.train.networks import Networks
from ipadapter_jax.train.optim import Partitioned, all_finite, combine, learning_rate, updates_done
from ipadapter_jax.train.sharding import optimizer_sharding
from ipadapter_jax.train.state import TrainState

Tree = TypeVar("Tree")

_GATHERED = "gathered"  # names the gathered weights, which the backward pass does not store


class RandomDraws(NamedTuple):
    """The random decisions for every sample of a batch."""

    drop_image: Array  # (B,) bool
    drop_text: Array  # (B,) bool
    timestep: Array  # (B,) int32
    noise: Array  # (B, h, w, 4) standard normal
    posterior_noise: Array  # (B, h, w, 4) standard normal: which latents of the VAE's posterior


def random_draws(
    seed: int, step: Array, indices: Array, shape: tuple[int, ...], timesteps: int, drop: tuple[float, float, float]
) -> RandomDraws:
    """Draws for the samples of a step with these indices; shape: (h, w, 4). One number decides what is dropped, as in
    the authors' data set: below drop[0] the image, below drop[0] + drop[1] the text, below the sum of all three
    both."""
    image, text, both = np.cumsum(np.asarray(drop, np.float32))
    of_step = jax.random.fold_in(key(seed), step)

    def one(index: Array) -> RandomDraws:
        keys = jax.random.split(jax.random.fold_in(of_step, index), 4)
        chance = jax.random.uniform(keys[0], (), jnp.float32)
        return RandomDraws(
            drop_image=(chance < image) | ((text <= chance) & (chance < both)),
            drop_text=(image <= chance) & (chance < both),
            timestep=jax.random.randint(keys[1], (), 0, timesteps, jnp.int32),
            noise=jax.random.normal(keys[2], shape, jnp.float32),
            posterior_noise=jax.random.normal(keys[3], shape, jnp.float32),
        )

    return jax.vmap(one)(indices)


class DenoisingInputs(NamedTuple):
    """What the trainable networks take: what the frozen ones make of a batch."""

    noisy: Array  # (B, h, w, 4)
    timestep: Array  # (B,)
    target: Array  # (B, h, w, 4) float32
    text: Array  # (B, 77, D)
    features: Array | None  # (B, F) or (B, L, F)


def denoising_inputs(
    networks: Networks, frozen: FrozenModels, batch: TrainBatch, draws: RandomDraws
) -> DenoisingInputs:
    """Latents with noise, text states and image features, dropped where the draws say so."""
    latents = networks.vae.sample(posterior(networks, frozen, batch), draws.posterior_noise)
    signal = jnp.asarray(networks.schedule.alphas_cumprod)[draws.timestep][:, None, None, None]
    alpha, sigma = jnp.sqrt(signal), jnp.sqrt(1 - signal)
    noisy = add_noise(alpha, sigma, latents, draws.noise)
    target = training_target(networks.schedule.prediction_type, alpha, sigma, latents, draws.noise)
    ids = jnp.where(draws.drop_text[:, None], frozen.empty_ids, batch.input_ids)
    text = networks.text_states(frozen, ids)
    return DenoisingInputs(
        noisy, draws.timestep, target, text, image_features(networks, frozen, batch, draws.drop_image)
    )


def posterior(networks: Networks, frozen: FrozenModels, batch: TrainBatch) -> Posterior:
    """The unscaled posterior of the latents, float32: cached, or made from the pixels."""
    if isinstance(batch, EncodedBatch):
        return Posterior(batch.mean.astype(jnp.float32), batch.logvar.astype(jnp.float32))
    return networks.posterior(frozen, batch.pixels)


def image_features(networks: Networks, frozen: FrozenModels, batch: TrainBatch, drop: Array) -> Array | None:
    """The encoder's features. A dropped image is a zero embedding for the base variant and the states of zero pixels
    for the others: what their samplers use as the unconditional image."""
    if networks.projection is None:
        return None
    patches = networks.projection.config.feature_kind.has_positions
    if isinstance(batch, EncodedBatch):
        assert batch.features is not None
        features, dropped = batch.features, 0
        if patches:
            assert frozen.zero_features is not None
            dropped = frozen.zero_features.astype(features.dtype)
    else:
        pixels = jnp.asarray(CLIP_TABLE)[batch.clip_pixels, jnp.arange(3)]
        if patches:
            pixels = jnp.where(drop[:, None, None, None], 0, pixels)
        features, dropped = networks.image_features(frozen, pixels), 0
        if patches:
            return features
    return jnp.where(drop.reshape(-1, *(1,) * (features.ndim - 1)), dropped, features)


def sample_losses(networks: Networks, params: Mapping[str, Params], inputs: DenoisingInputs) -> Array:
    """Mean squared error of each sample, (B,) float32."""
    output = networks.predict(params, inputs.noisy, inputs.timestep, inputs.text, inputs.features)
    return jnp.mean((output - inputs.target) ** 2, axis=(1, 2, 3))


class StepMetrics(NamedTuple):
    """What a step reports: scalars. In alphabetical order, which is the order in metrics.jsonl."""

    bad_steps: Array  # int32, updates skipped in a row
    gradient_norm: Array
    learning_rate: Array
    loss: Array
    loss_scale: Array | None  # with float16


class StepResult(NamedTuple):
    """What a step gives."""

    state: TrainState
    metrics: StepMetrics


class LossAndGradients(NamedTuple):
    """Of a batch, or of a part of it."""

    loss: Array
    gradients: Partitioned


Step = Callable[[TrainState, FrozenModels, TrainBatch], StepResult]


def make_step(networks: Networks, optimizer: optax.GradientTransformation, config: Train, mesh: Mesh) -> Step:
    """The step (state, frozen, batch) -> (state, metrics), for jax.jit, which is to donate the state."""

    def step(state: TrainState, frozen: FrozenModels, batch: TrainBatch) -> StepResult:
        size = batch.input_ids.shape[0]
        indices = jax.lax.with_sharding_constraint(jnp.arange(size), batch_sharding(mesh))
        timesteps, data = networks.schedule.num_train_timesteps, config.data
        drop = (data.drop_image, data.drop_text, data.drop_both)
        draws = random_draws(config.seed, state.step, indices, networks.latent_shape, timesteps, drop)
        parts = config.optim.accumulate
        if parts == 1:
            loss, grads = gradient(state, frozen, batch, draws)
        else:
            loss, grads = _accumulated(lambda b, d: gradient(state, frozen, b, d), batch, draws, parts)
        return update(state, loss, grads)

    def gradient(state: TrainState, frozen: FrozenModels, batch: TrainBatch, draws: RandomDraws) -> LossAndGradients:
        with batch_sharded(mesh):
            inputs = denoising_inputs(networks, gathered(frozen, mesh), batch, draws)

        def scaled_loss(trainable, frozen):
            loss = sample_losses(networks, combine(trainable, gathered(frozen, mesh).params), inputs).mean()
            return loss * state.loss_scale.scale, loss

        if mesh.shape["fsdp"] > 1:  # the backward pass gathers the weights again rather than storing them
            policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
            scaled_loss = jax.checkpoint(scaled_loss, policy=policy)
        with batch_sharded(mesh):
            (_, loss), grads = jax.value_and_grad(scaled_loss, has_aux=True)(state.params, frozen)
        return LossAndGradients(loss, jax.tree.map(lambda g: g / state.loss_scale.scale, grads))

    def update(state: TrainState, loss: Array, grads: Partitioned) -> StepResult:
        # Sharded as the optimizer's state is: each device updates its part, and the parts are gathered.
        grads = jax.tree.map(lambda g: jax.lax.with_sharding_constraint(g, optimizer_sharding(mesh, g)), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A finite gradient may have an infinite square, which would stay in the moments and freeze its weight for good.
        finite = all_finite((loss, grads, opt_state, params))
        ema, decay = state.ema, config.optim.ema
        if decay is not None:
            ema = jax.tree.map(lambda new, old: optax.incremental_update(new, old, 1 - decay), params, ema)
        new = TrainState(
            step=state.step + 1,
            params=jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, replicated(mesh)), params),
            opt_state=opt_state,
            ema=ema,
            loss_scale=state.loss_scale.after(finite, config.model.dtype),
            bad_steps=jnp.int32(0),
        )
        old = new._replace(params=state.params, opt_state=state.opt_state, ema=state.ema, bad_steps=state.bad_steps + 1)
        chosen = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = StepMetrics(
            bad_steps=chosen.bad_steps,
            gradient_norm=optax.tree.norm(grads),
            learning_rate=jnp.float32(learning_rate(config.optim)(updates_done(state.opt_state))),
            loss=loss,
            loss_scale=chosen.loss_scale.scale if config.model.dtype == "float16" else None,
        )
        return StepResult(chosen, metrics)

    return step


def gathered(frozen: FrozenModels, mesh: Mesh) -> FrozenModels:
    """Frozen weights that are sharded over `fsdp`, gathered where they are used."""
    if mesh.shape["fsdp"] == 1:
        return frozen

    def gather(leaf: Array) -> Array:
        return checkpoint_name(jax.lax.with_sharding_constraint(leaf, replicated(mesh)), _GATHERED)

    return jax.tree.map(gather, frozen)


def in_parts(batch: Tree, parts: int) -> Tree:
    """Arrays (B, ...) -> (parts, B / parts, ...). Part i has the samples i, i + parts, ...: each device
    holds the samples of its shard already."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def _accumulated(
    gradient: Callable[[TrainBatch, RandomDraws], LossAndGradients], batch: TrainBatch, draws: RandomDraws, parts: int
) -> LossAndGradients:
    """Loss and gradient of the mean over a batch, computed in `parts`, one after the other."""
    split = in_parts((batch, draws), parts)
    like = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], split))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(*part)), None

    total, _ = jax.lax.scan(add, zero, split)
    return jax.tree.map(lambda x: x / parts, total)
