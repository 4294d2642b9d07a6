"""The types of trees: what JAX maps functions over."""

from collections.abc import Mapping
from typing import Any

from jax import Array, ShapeDtypeStruct

Params = Mapping[str, Any]
"""Arrays (or shapes, shardings) by name: the parameters of one network, nested as its modules are."""

Leaf = Array | ShapeDtypeStruct
"""An array of a tree, or its shape and dtype where there is no array yet."""

PyTree = Any
"""A value that JAX sees as a tree: any nesting of arrays, dictionaries, sequences and registered structures.

Where the result has the structure of an argument, a type variable says more.
"""
