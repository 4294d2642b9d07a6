"""All that changes during training, and nothing else: what a checkpoint holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from ipadapter_jax.runtime.mesh import replicated
from ipadapter_jax.train.optim import LossScale, Partitioned
from ipadapter_jax.train.sharding import optimizer_sharding


class TrainState(NamedTuple):
    """The trainable parameters, in float32, with their optimizer. A frozen part is optax.MaskedNode, no leaf."""

    step: Array  # int32, updates done, skipped ones too
    params: Partitioned
    opt_state: optax.OptState
    ema: Partitioned | None
    loss_scale: LossScale
    bad_steps: Array  # int32, updates skipped in a row

    @property
    def averaged_params(self) -> Partitioned:
        """What is validated and exported: the moving average where one is kept, else the parameters."""
        return self.params if self.ema is None else self.ema


def init_train_state(
    params: Partitioned, optimizer: optax.GradientTransformation, *, dtype: str, ema: bool
) -> TrainState:
    """The state before the first step. `params`: the trainable parameters, as `partition` gives them; `dtype`: of the
    computation; `ema`: whether a moving average is kept."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    scale = LossScale.initial(dtype)
    return TrainState(jnp.int32(0), params, optimizer.init(params), average, scale, jnp.int32(0))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """The optimizer's moments and the moving average are sharded over all devices, the parameters replicated."""
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    sharded = jax.tree.map(lambda leaf: optimizer_sharding(mesh, leaf), state)
    return whole._replace(opt_state=sharded.opt_state, ema=sharded.ema)
