"""Layers whose parameters are traced faster than flax's, and shapes of parameters without computing them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope, meta
from jax import Array
from jax.typing import DTypeLike


class SkipShapeCheck:
    """A layer's first base class, in front of an nn.Module: its parameters cost less to trace than flax's.

    For each given parameter flax traces the initializer to compare shapes. That takes a quarter of the time of tracing
    a network, and weights/load_tree.py has compared the shapes already. Without a random key parameters are zeros,
    since `parameter_shapes` needs no values. Every parameter still passes through `nn.Module.param`, so that tools that
    replace this method, such as qwix to quantize weights, see all of them.
    """

    def param(self: Any, name: str, init: Callable, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        given = self.has_variable("params", name)
        if not given and not self.has_rng("params") and self.is_mutable_collection("params"):
            self.put_variable("params", name, jnp.zeros(shape, dtype))
            given = True
        if given:
            self.scope.param = functools.partial(_given_param, self.scope)  # what nn.Module.param calls
        return nn.Module.param(self, name, init, shape, dtype)


def _given_param(
    scope: Scope, name: str, init: Callable, *init_args: object, unbox: bool = True, **init_kwargs: object
) -> Array | meta.AxisMetadata[Array]:
    """flax's `Scope.param`, which does not trace the initializer of a parameter that exists."""
    if not scope.has_variable("params", name):
        return Scope.param(scope, name, init, *init_args, unbox=unbox, **init_kwargs)
    scope.reserve(name, "params")
    value = scope.get_variable("params", name)
    return meta.unbox(value) if unbox else value


def parameter_shapes(
    module: nn.Module, *inputs: object, method: Callable | None = None, **named: object
) -> dict[str, object]:
    """The module's parameter tree with leaves jax.ShapeDtypeStruct. Inputs are arrays or jax.ShapeDtypeStruct."""
    init = functools.partial(module.init, {}, method=method)
    return jax.eval_shape(init, *inputs, **named)["params"]
