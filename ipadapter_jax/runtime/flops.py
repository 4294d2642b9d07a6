"""Counts the floating-point operations of a program from its jaxpr, without running it.

A multiplication with its addition is 2 FLOP, and only matrix products and convolutions count: the convention of
published utilization figures. Rematerialized products of the backward pass are counted separately, those of
jax.checkpoint and those inside attention kernels.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.core import Atom, ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval


class Product(NamedTuple):
    """A matrix product or convolution, with all of its repetitions."""

    where: str  # names of the modules and transformations around it, "a/b/c"
    kind: str  # "matmul" or "conv"
    flops: int
    rematerialized: bool  # computed a second time, for the backward pass


class AttentionProducts(NamedTuple):
    """The matrix products of an attention kernel: those that count, and those computed a second time."""

    once: int
    again: int


def count_flops(jaxpr: ClosedJaxpr) -> Counter[str]:
    """FLOP per kind ("matmul", "conv") of a program of jax.make_jaxpr, all devices together.

    Products that no result depends on are not counted: the compiler removes them. The body of a loop counts as often as
    it runs. Raises
    ValueError for products inside a loop of unknown length.
    """
    return _by_kind(found for found in products(jaxpr) if not found.rematerialized)


def count_recomputed_flops(jaxpr: ClosedJaxpr) -> Counter[str]:
    """The same for rematerialized products, which `count_flops` leaves out."""
    return _by_kind(found for found in products(jaxpr) if found.rematerialized)


def products(jaxpr: ClosedJaxpr) -> Iterator[Product]:
    """All products of a program that `count_flops` or `count_recomputed_flops` count."""
    alive = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[0]
    yield from _products(alive, "", 1)


def _by_kind(found: Iterable[Product]) -> Counter[str]:
    total: Counter[str] = Counter()
    for product in found:
        total[product.kind] += product.flops
    return total


def _products(jaxpr: Jaxpr | ClosedJaxpr, outside: str, times: int) -> Iterator[Product]:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        where = f"{outside}/{eqn.source_info.name_stack}"
        rematerialized = "rematted_computation" in where  # the name that jax.checkpoint gives
        kernel = attention_kernel(eqn)
        if name in _FORMULAE:
            kind, formula = _FORMULAE[name]
            yield Product(where, kind, times * formula(eqn), rematerialized)
        elif kernel is not None:
            once, twice = (count * times * _attention_product(eqn) for count in kernel)
            yield Product(where, "matmul", once, rematerialized)
            yield Product(where, "matmul", twice, True)
        elif name == "cond":
            branches = ([*_products(branch, where, times)] for branch in params["branches"])
            yield from max(branches, key=lambda branch: sum(found.flops for found in branch))
        else:
            rounds = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            inside = [found for p in programs(params.values()) for found in _products(p, where, times * rounds)]
            if name == "while" and inside:
                raise ValueError("matrix products inside a while loop of unknown length; write it as a scan")
            yield from inside


def programs(values: Iterable[object]) -> Iterator[Jaxpr | ClosedJaxpr]:
    """The inner programs among an instruction's parameters: those of jit, scan, checkpoint, custom derivatives etc."""
    for value in values:
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from programs(value)


def _array(atom: Atom) -> ShapedArray:
    """Shape and dtype of an operand or a result, which must be an array."""
    assert isinstance(atom.aval, ShapedArray)
    return atom.aval


def _matmul(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = _array(eqn.invars[0]).shape
    return 2 * _array(eqn.outvars[0]).size * math.prod(left[axis] for axis in contracted)


def _conv(eqn: JaxprEqn) -> int:
    """FLOP of a convolution. The zeros between the inputs of a transposed strided convolution do not count; padding
    counts."""
    kernel, params = _array(eqn.invars[1]), eqn.params
    output_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return 2 * _array(eqn.outvars[0]).size * (kernel.size // output_channels) // math.prod(params["lhs_dilation"])


def attention_kernel(eqn: JaxprEqn) -> AttentionProducts | None:
    """The number of matrix products of queries, keys and values in an attention kernel, and how many it computes a
    second
    time: the weights in the backward pass, and one gradient that both of Pallas's kernels need. None for any other
    instruction."""
    name = str(eqn.params.get("name")) if eqn.primitive.name == "pallas_call" else eqn.primitive.name
    return next((products for start, products in _ATTENTION.items() if name.startswith(start)), None)


_ATTENTION: Mapping[str, AttentionProducts] = {
    "dot_product_attention_fwd": AttentionProducts(2, 0),
    "dot_product_attention_bwd": AttentionProducts(4, 1),
    "splash_mha_fwd": AttentionProducts(2, 0),
    "splash_mha_dq": AttentionProducts(2, 1),
    "splash_mha_dkv": AttentionProducts(2, 2),
}


def _attention_product(eqn: JaxprEqn) -> int:
    """FLOP of one such product: queries (B, L, heads, d) and keys (B, S, heads, d), for Pallas (..., heads, L, d)."""
    given = map(_array, eqn.invars)
    query, key, *_ = (x for x in given if x.ndim > 2 and jnp.issubdtype(x.dtype, jnp.floating))
    return 2 * query.size * key.shape[-2 if eqn.primitive.name == "pallas_call" else 1]


_FORMULAE: Mapping[str, tuple[str, Callable[[JaxprEqn], int]]] = {
    "dot_general": ("matmul", _matmul),
    "conv_general_dilated": ("conv", _conv),
}
