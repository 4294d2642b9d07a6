"""What learns, and how: one mask, the optimiser over it, the scale of the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ipadapter_jax.train.config import Model, Optim

PARTS = ("unet", "image_proj", "ip_adapter")

_GROWTH_STEPS = 2000  # good steps before the loss scale is doubled
_FIRST_SCALE = 2.0**15


def trainable(model: Model) -> dict[str, bool]:
    """The mask, a prefix of the parameter tree: which of its parts learn."""
    return {part: part in model.train for part in PARTS if part == "unet" or model.adapter != "none"}


def make_optimizer(optim: Optim, mask: dict[str, bool]) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) for the parts that the mask names; the others have no state."""
    rate = optax.linear_schedule(0.0, optim.learning_rate, optim.warmup_steps) if optim.warmup_steps else None
    adamw = optax.adamw(
        optim.learning_rate if rate is None else lambda count: rate(count + 1),
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
    )
    clip = optax.identity() if optim.clip_norm is None else optax.clip_by_global_norm(optim.clip_norm)
    return optax.masked(optax.chain(clip, adamw), mask)


def view(params: dict[str, Any], mask: dict[str, bool]) -> dict[str, Any]:
    """The parameters that learn; a frozen part is an empty place, for the gradient and the optimiser alike."""
    return {part: params[part] if learns else optax.MaskedNode() for part, learns in mask.items()}


def fill(learnt: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The view with its empty places filled from the frozen parts."""
    return {part: frozen[part] if isinstance(tree, optax.MaskedNode) else tree for part, tree in learnt.items()}


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


def all_finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
