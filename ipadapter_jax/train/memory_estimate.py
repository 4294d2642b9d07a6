"""The peak memory of a program, estimated from its jaxpr by a scan in program order.

The compiler fuses elementwise operations with what reads them and recomputes them rather than storing them, so these
rules say what lies in memory:

- what products, convolutions, kernels, reductions and loops give, and what all of these but reductions read. A product
  that is only read rounded is written rounded; a convolution's kernel is laid out anew, and the copy stays as well;
- an elementwise result that three or more operations read, but for exponentials: the weights of a softmax are formed
  again. Of others, what they are made of stays in their place.

Against what XLA's compiler plans for an A100 and the training step of SD 1.5 (tests/unit/train/test_memory.py) the peak
is 0.95 to 1.13 times as large; for small networks, where it is one chunk of attention, up to 1.36 times.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jax.interpreters import partial_eval

from ipadapter_jax.runtime.flops import attention_kernel, programs

_CHECKPOINTS = {"checkpoint", "remat2"}
_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", *_CHECKPOINTS}
_LOOPS = {"scan", "while", "cond"}
_ATTENTION = "attention kernel"
_READERS = {"dot_general", "conv_general_dilated", _ATTENTION, *_LOOPS}
_WRITERS = _READERS | {"concatenate", "gather", "scatter", "scatter-add", "sort", "cumsum", "argmax", "argmin"}
_VIEWS = {"reshape", "transpose", "squeeze", "convert_element_type", "broadcast_in_dim", "optimization_barrier", "copy"}
_AGAIN = _VIEWS | {"exp"}
_MANY = 3


@dataclasses.dataclass(eq=False)
class _Value:
    bytes: int
    held: bool  # in memory
    source: "_Value | None"  # of a view
    made_of: frozenset["_Value"] = frozenset()  # the held values that it can be computed from
    last: int = -1  # the operation that needs it last


@dataclasses.dataclass(eq=False)
class _Operation:
    name: str
    operands: list[_Value]
    results: list[_Value]
    inside: int  # bytes that a loop's body needs


def peak_bytes(jaxpr: ClosedJaxpr) -> int:
    """Most bytes that a program of jax.make_jaxpr holds at a time, next to its arguments. Elementwise results of the
    whole program are not counted: those of a step take the place of the state that is donated."""
    return _peak(partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[0])


def _peak(jaxpr: Jaxpr) -> int:
    values: dict[Var, _Value] = {}
    operations = list(_flat(jaxpr, values))
    _hold(operations)
    for time, operation in enumerate(operations):
        made_of = frozenset().union(*(operand.made_of for operand in operation.operands))
        for result in operation.results:
            result.made_of = frozenset([result]) if result.held else made_of
        if any(result.held for result in operation.results):
            for value in made_of:
                value.last = time
    for value in _known(jaxpr.outvars, values):
        for held in value.made_of:
            held.last = len(operations)
    return _most(operations)


def _flat(jaxpr: Jaxpr, values: dict[Var, _Value]) -> Iterator[_Operation]:
    """The operations, those of called programs in their place; fills `values`. Arguments have no value."""
    kernels: set[_Value] = set()
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, [_open(p) for p in programs(eqn.params.values())]
        name = name if attention_kernel(eqn) is None else _ATTENTION
        if name in _CALLS:
            given = zip(reversed(inner[0].invars), reversed(eqn.invars), strict=False)
            inside = {own: values[var] for own, var in given if not isinstance(var, Literal) and var in values}
            if name in _CHECKPOINTS:  # what is rematerialized starts from the arguments
                inside = {own: value for own, value in inside.items() if value not in kernels}
            yield from _flat(inner[0], inside)
            results = zip(eqn.outvars, inner[0].outvars, strict=True)
            values.update((var, inside[own]) for var, own in results if not isinstance(own, Literal) and own in inside)
            continue
        weights = eqn.invars[1] if name == "conv_general_dilated" else None
        if isinstance(weights, Var) and weights not in values:
            kernel = values[weights] = _Value(_bytes(weights), held=True, source=None)
            kernels.add(kernel)
            yield _Operation("copy", [], [kernel], 0)
        operands = _known(eqn.invars, values)
        source = operands[0] if name in _VIEWS and operands else None
        held = name in _WRITERS or name.startswith("reduce_")
        results = [_Value(_bytes(var), held, source) for var in eqn.outvars]
        values.update(zip(eqn.outvars, results, strict=True))
        yield _Operation(name, operands, results, max(map(_peak, inner), default=0) if name in _LOOPS else 0)


def _open(program: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _bytes(var: Any) -> int:
    return var.aval.size * var.aval.dtype.itemsize


def _known(variables: Iterable[Var | Literal], values: Mapping[Var, _Value]) -> list[_Value]:
    return [values[var] for var in variables if not isinstance(var, Literal) and var in values]


def _hold(operations: list[_Operation]) -> None:
    """Decides what lies in memory, by the rules above."""
    readers = Counter(operand for operation in operations for operand in set(operation.operands))
    for operation in operations:
        for operand in operation.operands if operation.name in _READERS else ():
            while operand.source is not None and operand.source.bytes <= operand.bytes:
                operand = operand.source  # a view is not a copy
            operand.held = True
        if operation.name == "convert_element_type" and operation.operands:
            (product,), (rounded,) = operation.operands, operation.results
            if product.held and readers[product] == 1:
                product.bytes = min(product.bytes, rounded.bytes)
        elif operation.name not in _AGAIN:
            for result in operation.results:
                result.held |= readers[result] >= _MANY


def _most(operations: list[_Operation]) -> int:
    """The sum over all values that are held, where it is greatest."""
    live = most = 0
    dying: defaultdict[int, int] = defaultdict(int)
    for time, operation in enumerate(operations):
        for result in operation.results:
            if result.held and result.last >= 0:
                live += result.bytes
                dying[result.last] += result.bytes
        most = max(most, live + operation.inside)
        live -= dying[time]
    return most
