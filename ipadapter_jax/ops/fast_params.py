"""Parameters of layers: taken as they are given, drawn with a key, or without one only their shapes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Parameters:
    """In front of nn.Module among a layer's bases: its parameters cost less to trace than flax's.

    flax traces the initializer of each parameter that is given, to hold the shape against it: a quarter of the time
    that tracing a network takes. weights/tree.py has held it already. And without a key nothing is drawn: who asks for
    shapes alone (`parameter_shapes`) would wait for numbers that nobody sees.
    """

    def param(self: Any, name: str, draw: Callable, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        if not self.has_variable("params", name):
            if self.has_rng("params") or not self.is_mutable_collection("params"):
                return nn.Module.param(self, name, draw, shape, dtype)  # draws it, or says that it is missing
            self.put_variable("params", name, jnp.zeros(shape, dtype))
        return self.get_variable("params", name)


def parameter_shapes(module: nn.Module, *inputs: Any, method: Callable | None = None, **named: Any) -> dict[str, Any]:
    """The tree of the module's parameters with jax.ShapeDtypeStruct for leaves. Inputs may be such, too."""
    init = functools.partial(module.init, {}, method=method)
    return jax.eval_shape(init, *inputs, **named)["params"]
