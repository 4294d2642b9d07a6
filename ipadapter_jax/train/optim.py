"""Which parameters are trainable, and how: one mask, the optimizer over it, the scale of the loss."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ipadapter_jax.runtime.trees import PyTree
from ipadapter_jax.train.config import Model, Optim
from ipadapter_jax.weights.load_tree import Tree

Partitioned = dict[str, Tree | optax.MaskedNode]
"""Parameters by part, with optax.MaskedNode in place of those of a frozen part: no leaves for the gradient and the
optimizer."""

PARTS = ("unet", "image_proj", "ip_adapter")

_GROWTH_STEPS = 2000  # good steps before the loss scale is doubled
_FIRST_SCALE = 2.0**15


def trainable_mask(model: Model) -> dict[str, bool]:
    """The mask, a prefix of the parameter tree: which of its parts are trainable."""
    return {part: part in model.train for part in PARTS if part == "unet" or model.adapter != "none"}


def make_optimizer(optim: Optim, mask: dict[str, bool]) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) for the parts that the mask names; the others have no state."""
    clip = optax.identity() if optim.clip_norm is None else optax.clip_by_global_norm(optim.clip_norm)
    adam = scale_by_adam(optim.beta1, optim.beta2, optim.epsilon)
    decay = optax.add_decayed_weights(optim.weight_decay)
    return optax.masked(optax.chain(clip, adam, decay, optax.scale_by_learning_rate(learning_rate(optim))), mask)


def learning_rate(optim: Optim) -> optax.Schedule:
    """The learning rate by the number of updates before it."""
    first = optim.learning_rate / (optim.warmup_steps + 1)
    return optax.linear_schedule(first, optim.learning_rate, optim.warmup_steps)


def updates_done(opt_state: optax.OptState) -> Array:
    """The updates that an optimizer has made, without those that were skipped."""
    _, count = next(iter(optax.tree_utils.tree_get_all_with_path(opt_state, "count")))
    return count


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980, algorithm 1). As optax's, but for 1 - beta^t: from a float32 beta2 of 0.999 that is wrong
    by 1e-5 at first, and ten steps would not be PyTorch's to its own rounding."""

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, zeros)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        assert isinstance(state, optax.ScaleByAdamState)
        count = optax.safe_increment(state.count)
        mean = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        square = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, state.nu, updates)
        first, second = (-jnp.expm1(count * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
        scaled = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + epsilon), mean, square)
        return scaled, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def partition(params: Mapping[str, Tree], mask: Mapping[str, bool]) -> Partitioned:
    """The trainable parameters of all parts that the mask names."""
    return {part: params[part] if is_trainable else optax.MaskedNode() for part, is_trainable in mask.items()}


def combine(trainable: Partitioned, frozen: Mapping[str, Tree]) -> dict[str, Tree]:
    """All parameters: trainable parts, and in place of optax.MaskedNode the frozen ones."""
    return {part: frozen[part] if isinstance(tree, optax.MaskedNode) else tree for part, tree in trainable.items()}


class LossScale(NamedTuple):
    """Dynamic loss scaling for float16 (arXiv 1710.03740, section 3.2): small gradients are lifted over its least
    number, and an overflow halves the scale."""

    scale: Array  # float32, a power of two
    good_steps: Array  # int32, since the scale last changed

    @classmethod
    def initial(cls, dtype: str) -> "LossScale":
        return cls(jnp.float32(_FIRST_SCALE if dtype == "float16" else 1.0), jnp.int32(0))

    def after(self, finite: Array, dtype: str) -> "LossScale":
        """Only float16 needs it: in the other formats gradients have the range of float32."""
        if dtype != "float16":
            return self
        good = jnp.where(finite, self.good_steps + 1, 0)
        grown = jnp.where(good >= _GROWTH_STEPS, self.scale * 2, self.scale)
        scale = jnp.where(finite, grown, jnp.maximum(self.scale / 2, 1.0))
        return LossScale(scale, jnp.where(good >= _GROWTH_STEPS, 0, good))


def all_finite(tree: PyTree) -> Array:
    """A boolean scalar. The flags of the leaves are sorted rather than combined: what can be fused XLA copies into all
    that reads it, all flags into the update of every weight, which compiles for minutes."""
    flags = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    return jnp.sort(flags.astype(jnp.int32))[0] == 1
